//! How much of the store a guest may use.

/// Limits for each guest; domain 0 has none of its own. The defaults are Xen's, but for the bytes of transactions: Xen limits all memory of a guest
/// together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Nodes it owns.
    pub nodes: usize,
    /// Watches of one connection.
    pub watches: usize,
    /// Open transactions of one connection.
    pub transactions: usize,
    /// Bytes of a node: value, names of children and permissions together.
    pub node_bytes: usize,
    /// Entries of a node's permissions.
    pub perms: usize,
    /// Replies it leaves unfetched before no more requests are taken.
    pub outstanding: usize,
    /// Nodes one transaction may touch, existing or not.
    pub transaction_nodes: usize,
    /// Bytes that its open transactions may hold together: paths and contents of the nodes they touch.
    pub transaction_bytes: usize,
    /// Watch events it leaves unfetched before further ones are dropped.
    pub events: usize,
}

impl Default for Quota {
    fn default() -> Self {
        Quota {
            nodes: 1000,
            watches: 128,
            transactions: 10,
            node_bytes: 2048,
            perms: 5,
            outstanding: 20,
            transaction_nodes: 1024,
            transaction_bytes: 1 << 20,
            events: 1024,
        }
    }
}
