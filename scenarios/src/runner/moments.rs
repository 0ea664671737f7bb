//! When what happened in a migration, gathered from everybody who can tell.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;

use crate::scenario::Moment;

/// The moments of one migration. Cheap to clone; all clones share one board.
#[derive(Clone, Debug)]
pub(super) struct Moments {
    times: Arc<Mutex<BTreeMap<Moment, SystemTime>>>,
    changed: watch::Sender<()>,
}

impl Moments {
    pub(super) fn new() -> Self {
        Self {
            times: Arc::default(),
            changed: watch::Sender::new(()),
        }
    }

    /// Notes that something happened; only the first time counts.
    pub(super) fn note(&self, moment: Moment, at: SystemTime) {
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        if let std::collections::btree_map::Entry::Vacant(entry) = times.entry(moment) {
            entry.insert(at);
            drop(times);
            tracing::debug!(?moment, "moment");
            self.changed.send_replace(());
        }
    }

    /// When something happened, if it has.
    pub(super) fn at(&self, moment: Moment) -> Option<SystemTime> {
        let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        times.get(&moment).copied()
    }

    /// Returns once something has happened.
    pub(super) async fn wait(&self, moment: Moment) {
        let mut changed = self.changed.subscribe();
        while self.at(moment).is_none() {
            // The board itself holds a sender, so this cannot fail while it is waited on.
            let _ = changed.changed().await;
        }
    }

    /// Tells of every new moment.
    pub(super) fn changed(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What has happened, in the order it did: for messages.
    pub(super) fn so_far(&self) -> String {
        let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen: Vec<_> = times.iter().collect();
        seen.sort_by_key(|(_, at)| **at);
        let names: Vec<_> = seen
            .into_iter()
            .map(|(moment, _)| format!("{moment:?}").to_lowercase())
            .collect();
        if names.is_empty() {
            "nothing".to_owned()
        } else {
            names.join(", ")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_wait_ends_when_it_happens_and_the_first_time_counts() {
        let moments = Moments::new();
        let waiting = tokio::spawn({
            let moments = moments.clone();
            async move { moments.wait(Moment::Paused).await }
        });
        let first = SystemTime::UNIX_EPOCH + Duration::from_secs(5);
        moments.note(Moment::Armed, first);
        moments.note(Moment::Paused, first);
        moments.note(Moment::Paused, SystemTime::UNIX_EPOCH);
        waiting.await.unwrap();
        assert_eq!(moments.at(Moment::Paused), Some(first));
        assert_eq!(moments.at(Moment::Ready), None);
        moments.wait(Moment::Armed).await;
        assert_eq!(moments.so_far(), "armed, paused");
    }
}
