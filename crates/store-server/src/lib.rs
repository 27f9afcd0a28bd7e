//! The store as a process of its own, and its clients.
//!
//! One process serves the xenstore of all domains behind a unix socket that speaks Xen's socket protocol, so that Debian's `xenstore-*`
//! tools work. Nobody starts it by hand: whoever needs it and finds none starts one ([`Place`]). It ends when nobody has needed it for a
//! while.
//!
//! | part | what |
//! |---|---|
//! | `server` | sockets: one thread, `poll` |
//! | `core` | what the messages do: a [`hospes_store::Store`] and the guests' sessions; no I/O |
//! | `journal`, `entry` | what has to survive the process, on a tmpfs |
//! | [`StoreClient`] | the store with the rights of domain 0, for domain processes and commands |
//! | `guest` | a guest's connection, carried from its ring to the store process |
//!
//! **The process may be killed at any moment and nothing acknowledged is lost.** Before an answer leaves, what it acknowledges is in the
//! journal. Clients connect again, starting a new process where there is none, and repeat what was not answered. For guests each
//! request happens exactly once: requests are numbered, one is under way at a time, and the journal holds the last answer that came
//! with a change. Watches and undelivered events of guests are in the journal too, so that no event is lost; transactions are not, and
//! end with EAGAIN. Watches of domain 0's clients are set again and fire once.
//!
//! Trust: a peer has to have the same user id or be root; all of them act as domain 0 but for guests' sessions, which a peer opens for a
//! domain and which have that domain's rights only, and for restricted connections: a process that serves one domain gets them from a trusted one,
//! and reaches by them what belongs to that domain ([`Place::connect_restricted`], [`Connector`]).
//!
//! Refuses: to keep anything over a reboot of the host.
//!
//! Limits: 900 connections; a client that sends half a message and no more keeps 4112 bytes; a journal is written anew when it has
//! grown to four times what it has to say.
#![forbid(unsafe_code)]

mod bell;
mod client;
mod core;
mod entry;
mod events;
mod guest;
mod journal;
mod place;
mod protocol;
mod server;

pub use client::StoreClient;
pub use hospes_store::Error as StoreError;
pub use place::{Connector, Place, is_full};
pub use server::{ServerError, Surroundings, serve};

/// Takes arbitrary bytes for a step of a journal, without its checksum, for fuzzing. Panics only where the reader has a bug.
pub fn fuzz_journal(data: &[u8]) {
    let mut core = core::Core::new();
    if let Some(entries) = entry::decode(data) {
        core.restore(&entries);
    }
    core.begin();
    core.restore(&core.snapshot());
}
