//! A wire that broke, and the next one: a network in user space is a process, which may be killed.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Wire;
use super::link::Link;
use super::stats::Stats;
use crate::frame::Log;

/// Gives a new stream in the place of one that broke; the error is a sentence for the user.
pub type Renew = Arc<dyn Fn() -> Result<OwnedFd, String> + Send + Sync>;

/// A new wire is asked for no more often.
const PAUSE: Duration = Duration::from_secs(5);

/// What becomes of a queue's wire when it breaks.
pub struct Mend {
    renew: Option<Renew>,
    /// The next one may be asked for.
    next: Instant,
    stats: Arc<Stats>,
    log: Log,
}

impl Mend {
    pub fn new(renew: Option<Renew>, stats: Arc<Stats>, log: Log) -> Mend {
        Mend {
            renew,
            next: Instant::now(),
            stats,
            log,
        }
    }

    /// How long a queue without a wire may sleep; `None` where no other comes.
    pub fn pause(&self) -> Option<Duration> {
        self.renew.as_ref()?;
        Some(self.next.saturating_duration_since(Instant::now()))
    }

    /// A new wire, where there is one; `error` is what broke the old one, the first time.
    pub fn renew(&mut self, error: Option<String>) -> Option<Link> {
        if let Some(error) = error {
            (self.log)(&format!("A network device's wire broke: {error}"));
            let advice = match self.renew {
                Some(_) => "it is plugged in again within seconds",
                None => "detach it and attach it again",
            };
            self.stats
                .set_trouble(Some(format!("its wire broke ({error}): {advice}")));
        }
        let renew = self.renew.as_ref()?;
        if Instant::now() < self.next {
            return None;
        }
        let renewed = renew();
        self.next = Instant::now() + PAUSE;
        match renewed {
            Ok(fd) => {
                (self.log)("The network device is plugged in again");
                self.stats.set_trouble(None);
                Some(Link::new(fd, Wire::Stream))
            }
            Err(why) => {
                let trouble = format!(
                    "its wire broke and no new one is to be had, which is tried every {} seconds: {why}",
                    PAUSE.as_secs()
                );
                if self.stats.set_trouble(Some(trouble.clone())) {
                    (self.log)(&format!("A network device waits: {trouble}"));
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Monitor;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn mend(renew: Option<Renew>) -> (Mend, Arc<Stats>) {
        let stats = Arc::<Stats>::default();
        let mend = Mend::new(renew, Arc::clone(&stats), Arc::new(|_: &str| ()));
        (mend, stats)
    }

    #[test]
    fn wire_that_broke_is_trouble_until_there_is_another() {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let (mut first, stats) = mend(Some(Arc::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
            Err("no way".to_owned())
        })));
        assert!(first.renew(Some("gone".to_owned())).is_none());
        assert!(stats.trouble().unwrap().ends_with("no way"));
        // Not again at once.
        assert!(first.renew(None).is_none() && first.pause().unwrap() > Duration::ZERO);
        assert_eq!(asked.load(Ordering::SeqCst), 1);

        let (mut second, stats) = mend(Some(Arc::new(|| {
            Ok(rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap())
        })));
        assert!(second.renew(Some("gone".to_owned())).is_some());
        assert_eq!(stats.trouble(), None);

        let (mut last, stats) = mend(None);
        assert!(last.renew(Some("gone".to_owned())).is_none() && last.pause().is_none());
        assert!(stats.trouble().unwrap().contains("attach it again"));
    }
}
