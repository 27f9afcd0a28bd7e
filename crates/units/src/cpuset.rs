//! Sets of host CPUs.

use std::fmt;
use std::str::FromStr;

/// Most host CPUs that a set can name: what `sched_setaffinity` takes without more ado.
pub const HOST_CPUS_MAX: u32 = 1024;

/// A set of host CPUs by number, 0 to [`HOST_CPUS_MAX`] - 1. As text a list of numbers and ranges, as the kernel's own files have it: `0-3,7`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuSet {
    /// One bit for each CPU; the last word is not 0.
    words: Vec<u64>,
}

/// The text is no list of CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuSetError;

impl CpuSet {
    /// Adds a CPU; false where its number is too high.
    pub fn insert(&mut self, cpu: u32) -> bool {
        if cpu >= HOST_CPUS_MAX {
            return false;
        }
        let word = (cpu / 64) as usize;
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (cpu % 64);
        true
    }

    pub fn remove(&mut self, cpu: u32) {
        if let Some(word) = self.words.get_mut((cpu / 64) as usize) {
            *word &= !(1 << (cpu % 64));
        }
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
    }

    pub fn contains(&self, cpu: u32) -> bool {
        self.words
            .get((cpu / 64) as usize)
            .is_some_and(|word| word >> (cpu % 64) & 1 != 0)
    }

    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// In ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.words.len() as u32 * 64).filter(|cpu| self.contains(*cpu))
    }

    /// The CPUs that both have.
    pub fn intersection(&self, other: &CpuSet) -> CpuSet {
        self.iter().filter(|cpu| other.contains(*cpu)).collect()
    }

    /// Whether each CPU of the other set is in this one.
    pub fn covers(&self, other: &CpuSet) -> bool {
        other.iter().all(|cpu| self.contains(cpu))
    }
}

impl FromIterator<u32> for CpuSet {
    /// Numbers that are too high are left out.
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> CpuSet {
        let mut set = CpuSet::default();
        for cpu in cpus {
            set.insert(cpu);
        }
        set
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut next = 0;
        let end = self.words.len() as u32 * 64;
        let mut comma = "";
        while let Some(first) = (next..end).find(|cpu| self.contains(*cpu)) {
            next = (first..end).find(|cpu| !self.contains(*cpu)).unwrap_or(end);
            match next - first {
                1 => write!(f, "{comma}{first}")?,
                _ => write!(f, "{comma}{first}-{}", next - 1)?,
            }
            comma = ",";
        }
        Ok(())
    }
}

impl FromStr for CpuSet {
    type Err = CpuSetError;

    /// Reads a list; an empty one is the empty set.
    fn from_str(text: &str) -> Result<CpuSet, CpuSetError> {
        let mut set = CpuSet::default();
        let text = text.trim();
        if text.is_empty() {
            return Ok(set);
        }
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| text.trim().parse::<u32>().map_err(|_| CpuSetError);
            let (first, last) = (number(first)?, number(last)?);
            if first > last || last >= HOST_CPUS_MAX {
                return Err(CpuSetError);
            }
            for cpu in first..=last {
                set.insert(cpu);
            }
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_set_is_read_back() {
        for text in ["", "0", "0-3,7", "63-64", "1,3,5-1023"] {
            let set: CpuSet = text.parse().unwrap();
            assert_eq!(set.to_string(), text);
            assert_eq!(set.to_string().parse::<CpuSet>(), Ok(set));
        }
        assert_eq!(
            "2,1,0,1".parse::<CpuSet>().unwrap().to_string(),
            "0-2",
            "order and repetition do not matter"
        );
    }

    #[test]
    fn wrong_lists_are_refused() {
        for text in ["a", "3-1", "1,,2", "-1", "0-1024", "1-2-3", "4294967296"] {
            assert_eq!(text.parse::<CpuSet>(), Err(CpuSetError), "{text}");
        }
    }

    #[test]
    fn removing_the_last_cpus_gives_an_equal_set() {
        let mut set: CpuSet = "0,200".parse().unwrap();
        set.remove(200);
        assert_eq!(set, "0".parse().unwrap());
        set.remove(0);
        set.remove(700);
        assert!(set.is_empty());
        assert_eq!(set, CpuSet::default());
    }

    #[test]
    fn intersection_and_covers_agree() {
        let (a, b): (CpuSet, CpuSet) = ("0-4,70".parse().unwrap(), "3-70".parse().unwrap());
        let both = a.intersection(&b);
        assert_eq!(both.to_string(), "3-4,70");
        assert!(a.covers(&both) && b.covers(&both) && !both.covers(&a));
        assert!(both.covers(&CpuSet::default()));
    }
}
