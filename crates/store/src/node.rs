//! Nodes and who may use them.

use std::collections::BTreeSet;
use std::fmt;

use hospes_units::DomId;

/// What a domain may do to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    None,
    Read,
    Write,
    Both,
}

impl Access {
    fn letter(self) -> char {
        match self {
            Access::None => 'n',
            Access::Read => 'r',
            Access::Write => 'w',
            Access::Both => 'b',
        }
    }

    pub fn may_read(self) -> bool {
        matches!(self, Access::Read | Access::Both)
    }

    pub fn may_write(self) -> bool {
        matches!(self, Access::Write | Access::Both)
    }
}

/// One entry of a node's permissions, written `r3` on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Perm {
    pub domid: DomId,
    pub access: Access,
}

impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.access.letter(), self.domid)
    }
}

impl Perm {
    /// Reads the form of the wire.
    pub fn parse(text: &str) -> Option<Perm> {
        let (letter, number) = text.split_at_checked(1)?;
        let access = match letter {
            "n" => Access::None,
            "r" => Access::Read,
            "w" => Access::Write,
            "b" => Access::Both,
            _ => return None,
        };
        if !number.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let domid = DomId(number.parse().ok()?);
        Some(Perm { domid, access })
    }
}

/// A node's permissions: the owner, what everybody else may do, and exceptions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Perms {
    pub owner: DomId,
    pub others: Access,
    pub exceptions: Vec<Perm>,
}

impl Perms {
    /// Only domain 0 and, for reading, `reader`: what tools write for a guest.
    pub fn read_only(reader: DomId) -> Perms {
        Perms {
            owner: DomId::HOST,
            others: Access::None,
            exceptions: vec![Perm {
                domid: reader,
                access: Access::Read,
            }],
        }
    }

    /// Owned by a guest, closed to other guests.
    pub fn owned(owner: DomId) -> Perms {
        Perms {
            owner,
            others: Access::None,
            exceptions: Vec::new(),
        }
    }

    /// From entries as on the wire; the first is the owner with what others may do. `None` for an empty list.
    pub fn from_entries(entries: &[Perm]) -> Option<Perms> {
        let (first, rest) = entries.split_first()?;
        Some(Perms {
            owner: first.domid,
            others: first.access,
            exceptions: rest.to_vec(),
        })
    }

    /// Whether they say something of a domain.
    pub fn mentions(&self, domid: DomId) -> bool {
        self.owner == domid || self.exceptions.iter().any(|p| p.domid == domid)
    }

    /// The same permissions when a domain is gone: domain 0 takes over what it owned.
    pub fn without(&self, domid: DomId) -> Perms {
        let others = self.exceptions.iter().filter(|p| p.domid != domid);
        Perms {
            owner: match self.owner == domid {
                true => DomId::HOST,
                false => self.owner,
            },
            others: self.others,
            exceptions: others.copied().collect(),
        }
    }

    /// What they count for the limit on a node's size.
    pub fn bytes(&self) -> usize {
        4 * (1 + self.exceptions.len())
    }

    /// As entries of the wire.
    pub fn entries(&self) -> impl Iterator<Item = Perm> + '_ {
        let first = Perm {
            domid: self.owner,
            access: self.others,
        };
        std::iter::once(first).chain(self.exceptions.iter().copied())
    }

    /// What a domain may do.
    pub fn access(&self, domid: DomId) -> Access {
        self.access_with(domid, None)
    }

    /// What a domain may do that has the rights of `target` as well.
    pub fn access_with(&self, domid: DomId, target: Option<DomId>) -> Access {
        let is_it = |other: DomId| other == domid || Some(other) == target;
        if domid == DomId::HOST || is_it(self.owner) {
            return Access::Both;
        }
        self.exceptions
            .iter()
            .find(|p| is_it(p.domid))
            .map_or(self.others, |p| p.access)
    }
}

/// One node of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub value: Vec<u8>,
    pub children: BTreeSet<String>,
    pub perms: Perms,
    /// When it last changed, by the tree's counter.
    pub generation: u64,
}

impl Node {
    /// What it counts for the limit on a node's size.
    pub fn bytes(&self) -> usize {
        let names: usize = self.children.iter().map(|c| c.len() + 1).sum();
        self.value.len() + names + self.perms.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_prefers_owner_then_entry_then_default() {
        let p = Perms::from_entries(&["w5", "r7", "n8"].map(|t| Perm::parse(t).unwrap())).unwrap();
        assert_eq!(p.access(DomId(0)), Access::Both);
        assert_eq!(p.access(DomId(5)), Access::Both);
        assert_eq!(p.access(DomId(7)), Access::Read);
        assert_eq!(p.access(DomId(8)), Access::None);
        assert_eq!(p.access(DomId(9)), Access::Write);
    }

    #[test]
    fn parse_bad_entries_fails() {
        for text in ["", "r", "x3", "r-1", "r+1", "r65536", "3r", "é1"] {
            assert_eq!(Perm::parse(text), None, "{text}");
        }
        assert_eq!(Perm::parse("b12").unwrap().to_string(), "b12");
    }
}
