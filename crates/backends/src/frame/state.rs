//! The states of a device's two halves: what the back end does when the guest's half changes.
//!
//! Pure: [`step`] decides, the device's thread acts. Source: `public/io/xenbus.h` and what Linux' front ends do; a new kernel started by kexec
//! first leads the device of the old one through Closing and Closed.

use hospes_xen_abi::xenbus::XenbusState;

/// Where the back end stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its features are written; it waits for the guest.
    Waiting,
    /// The queues run.
    Connected,
    /// The guest is to stop; queues that run do so until it has.
    Closing,
    /// Nothing runs; the guest may start over.
    Closed,
}

impl Phase {
    /// What the guest reads.
    pub fn state(self) -> XenbusState {
        match self {
            Phase::Waiting => XenbusState::InitWait,
            Phase::Connected => XenbusState::Connected,
            Phase::Closing => XenbusState::Closing,
            Phase::Closed => XenbusState::Closed,
        }
    }
}

/// What the device's thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Nothing,
    Connect,
    /// Disconnects where connected unless the phase is Closing, and shows the phase.
    Go(Phase),
    /// Disconnects and removes the device.
    Remove,
}

/// What a state of the guest's half means to a back end in `phase`; `leaving` where the device is to be removed.
pub fn step(phase: Phase, front: XenbusState, leaving: bool) -> Action {
    use XenbusState as S;
    match (phase, front) {
        (Phase::Waiting | Phase::Closed, _) if leaving => Action::Remove,
        (_, S::Closed | S::Unknown | S::Initialising) if leaving => Action::Remove,
        (Phase::Waiting, S::Initialised | S::Connected) => Action::Connect,
        (Phase::Waiting | Phase::Connected, S::Closing) => Action::Go(Phase::Closing),
        (Phase::Waiting, S::Closed) => Action::Go(Phase::Closed),
        (Phase::Connected | Phase::Closing, S::Closed | S::Unknown) => Action::Go(Phase::Closed),
        // It started over without closing first.
        (Phase::Connected | Phase::Closing, S::Initialising | S::InitWait) => {
            Action::Go(Phase::Waiting)
        }
        (Phase::Closed, S::Initialising | S::InitWait) => Action::Go(Phase::Waiting),
        // It was quicker than we looked.
        (Phase::Closed, S::Initialised) => Action::Connect,
        _ => Action::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use XenbusState as S;

    fn follow(leaving: bool, states: &[(S, Action)]) {
        let mut phase = Phase::Waiting;
        for (front, action) in states {
            assert_eq!(step(phase, *front, leaving), *action, "{phase:?} {front:?}");
            match action {
                Action::Go(next) => phase = *next,
                Action::Connect => phase = Phase::Connected,
                Action::Nothing | Action::Remove => {}
            }
        }
    }

    #[test]
    fn step_connects_disk_and_network_devices() {
        follow(
            false,
            &[
                (S::Initialising, Action::Nothing),
                (S::Initialised, Action::Connect),
                (S::Connected, Action::Nothing),
            ],
        );
        follow(false, &[(S::Connected, Action::Connect)]);
    }

    #[test]
    fn step_follows_a_guest_that_closes_and_starts_over() {
        follow(
            false,
            &[
                (S::Initialised, Action::Connect),
                (S::Connected, Action::Nothing),
                (S::Closing, Action::Go(Phase::Closing)),
                (S::Closing, Action::Nothing),
                (S::Closed, Action::Go(Phase::Closed)),
                (S::Closed, Action::Nothing),
                (S::Initialising, Action::Go(Phase::Waiting)),
                (S::Initialised, Action::Connect),
            ],
        );
    }

    #[test]
    fn step_takes_a_new_kernel_that_resets_a_device_it_found_connected() {
        follow(
            false,
            &[
                (S::Connected, Action::Connect),
                (S::Closing, Action::Go(Phase::Closing)),
                (S::Closed, Action::Go(Phase::Closed)),
                (S::Initialising, Action::Go(Phase::Waiting)),
            ],
        );
        follow(
            false,
            &[
                (S::Connected, Action::Connect),
                (S::Initialising, Action::Go(Phase::Waiting)),
            ],
        );
    }

    #[test]
    fn step_removes_a_leaving_device_once_the_guest_let_go() {
        assert_eq!(step(Phase::Waiting, S::Initialising, true), Action::Remove);
        assert_eq!(step(Phase::Closing, S::Connected, true), Action::Nothing);
        assert_eq!(step(Phase::Closing, S::Closing, true), Action::Nothing);
        assert_eq!(step(Phase::Closing, S::Closed, true), Action::Remove);
        assert_eq!(step(Phase::Closing, S::Unknown, true), Action::Remove);
    }

    #[test]
    fn step_closes_when_the_guest_removes_its_directory() {
        assert_eq!(
            step(Phase::Connected, S::Unknown, false),
            Action::Go(Phase::Closed)
        );
        assert_eq!(step(Phase::Waiting, S::Unknown, false), Action::Nothing);
    }
}
