//! The user, and the rights that go beyond a user's.

use std::io;

use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Gid, Uid, dumpable_behavior, getgid, getuid, parent_process_death_signal,
    set_dumpable_behavior, set_parent_process_death_signal,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities,
    clear_ambient_capability_set, set_capabilities, set_capabilities_secure_bits, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::Error;

fn failed(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Rights(what, io::Error::from(errno))
}

/// Threads of this process; `None` where `/proc` does not tell.
pub(crate) fn threads() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

pub(crate) fn no_new_privileges() -> Result<(), Error> {
    set_no_new_privs(true).map_err(failed("give up new privileges"))
}

/// Leaves the host's networks for one that leads nowhere; whether it could, for which it takes CAP_SYS_ADMIN.
pub(crate) fn leave_networks() -> bool {
    // SAFETY: a system call on a number; the process has one thread.
    unsafe { libc::unshare(libc::CLONE_NEWNET) == 0 }
}

/// Bounds what can ever be had by executing files or by being root; whether it could, for which it takes CAP_SETPCAP.
pub(crate) fn bound() -> bool {
    // A change of the user takes capabilities away as ever, and that is locked as well.
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    let mut bounded = set_capabilities_secure_bits(bits).is_ok();
    // The kernel may know more capabilities than any library.
    for capability in 0..64 {
        // SAFETY: plain system calls on numbers.
        unsafe {
            if libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) < 0 {
                break;
            }
            bounded &= libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) == 0;
        }
    }
    bounded
}

pub(crate) enum Became {
    /// The user and group it asked for.
    Own(u32),
    /// It has no right to ask.
    Same,
    /// The kernel did not take the id.
    Refused(u32, i32),
}

/// Becomes the user and the group with this number, of no other group.
pub(crate) fn become_user(number: u32) -> Result<Became, Error> {
    let may = CapabilitySet::SETUID | CapabilitySet::SETGID;
    let has = capabilities(None).map_err(failed("read the own capabilities"))?;
    if !has.effective.contains(may) {
        return Ok(Became::Same);
    }
    let dumpable = dumpable_behavior().map_err(failed("read whether it is dumpable"))?;
    let parents_end = parent_process_death_signal().map_err(failed("read its parent's signal"))?;
    let (user, group) = (Uid::from_raw(number), Gid::from_raw(number));
    let (old_user, old_group) = (getuid(), getgid());
    let groups = || set_thread_groups(&[]);
    let group_then_user = || {
        set_thread_res_gid(group, group, group)?;
        set_thread_res_uid(user, user, user).inspect_err(|_| {
            let _ = set_thread_res_gid(old_group, old_group, old_group);
        })
    };
    // Groups first, which only who has capabilities gives up. EPERM: a user namespace that allows no groups to be set.
    match groups().and_then(|()| group_then_user()) {
        Ok(()) => {}
        Err(errno @ (Errno::INVAL | Errno::PERM)) => {
            return Ok(Became::Refused(number, errno.raw_os_error()));
        }
        Err(errno) => return Err(failed("become another user")(errno)),
    }
    if old_user != user {
        // A new user takes both away. With an id of its own, what it shows of itself it shows to nobody else.
        if matches!(dumpable, DumpableBehavior::Dumpable) {
            set_dumpable_behavior(dumpable).map_err(failed("stay dumpable"))?;
        }
        set_parent_process_death_signal(parents_end).map_err(failed("keep its parent's signal"))?;
    }
    Ok(Became::Own(number))
}

pub(crate) fn drop_capabilities() -> Result<(), Error> {
    // Kernels without ambient capabilities have none to clear.
    let _ = clear_ambient_capability_set();
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(failed("give up capabilities"))
}
