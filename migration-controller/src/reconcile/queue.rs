//! Which VMs are to be looked at, each by one worker at a time.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// A queue of keys.
///
/// # Guarantees
///
/// * A key is with one worker at a time.
/// * A key pushed while a worker has it is handed out again afterwards: a change that arrives
///   during the work is not lost.
/// * A key pushed many times before a worker takes it is handed out once.
pub(crate) struct Queue<K> {
    inner: Mutex<Inner<K>>,
    wake: Notify,
}

struct Inner<K> {
    ready: VecDeque<K>,
    /// The keys in `ready`.
    waiting: HashSet<K>,
    running: HashSet<K>,
    /// Pushed while running.
    again: HashSet<K>,
    timers: BTreeSet<(Instant, K)>,
    due: HashMap<K, Instant>,
    failures: HashMap<K, u32>,
}

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(15);

impl<K> Default for Queue<K> {
    fn default() -> Self {
        Self {
            inner: Mutex::new(Inner {
                ready: VecDeque::new(),
                waiting: HashSet::new(),
                running: HashSet::new(),
                again: HashSet::new(),
                timers: BTreeSet::new(),
                due: HashMap::new(),
                failures: HashMap::new(),
            }),
            wake: Notify::new(),
        }
    }
}

impl<K: Clone + Eq + Hash + Ord> Queue<K> {
    fn lock(&self) -> MutexGuard<'_, Inner<K>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands the key to a worker as soon as there is one.
    pub(crate) fn push(&self, key: K) {
        self.lock().push(key);
        self.wake.notify_one();
    }

    /// Hands the key out after `delay`, or earlier if it is pushed or has an earlier appointment.
    pub(crate) fn push_after(&self, key: K, delay: Duration) {
        self.lock().appoint(key, Instant::now() + delay);
        self.wake.notify_one();
    }

    /// Hands the key out again after a pause that grows with every failure in a row.
    pub(crate) fn retry(&self, key: K) {
        let mut inner = self.lock();
        let failures = inner.failures.entry(key.clone()).or_default();
        let pause = FIRST_BACKOFF.saturating_mul(1 << (*failures).min(16));
        *failures = failures.saturating_add(1);
        inner.appoint(key, Instant::now() + pause.min(LONGEST_BACKOFF));
        drop(inner);
        self.wake.notify_one();
    }

    /// The work on the key went well: the next failure is a first one.
    pub(crate) fn forgive(&self, key: &K) {
        self.lock().failures.remove(key);
    }

    /// The next key; waits until there is one. [`done`](Self::done) gives it back.
    pub(crate) async fn next(&self) -> K {
        loop {
            let wake = self.wake.notified();
            let next_due = {
                let mut inner = self.lock();
                inner.ring(Instant::now());
                if let Some(key) = inner.take() {
                    let more = !inner.ready.is_empty();
                    drop(inner);
                    if more {
                        self.wake.notify_one();
                    }
                    return key;
                }
                inner.timers.first().map(|(at, _)| *at)
            };
            match next_due {
                Some(at) => {
                    tokio::select! {
                        () = wake => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
                None => wake.await,
            }
        }
    }

    /// Gives a key back.
    pub(crate) fn done(&self, key: &K) {
        let mut inner = self.lock();
        inner.running.remove(key);
        if inner.again.remove(key) {
            inner.push(key.clone());
            drop(inner);
            self.wake.notify_one();
        }
    }

    /// How many keys wait for a worker.
    pub(crate) fn depth(&self) -> usize {
        self.lock().ready.len()
    }
}

impl<K: Clone + Eq + Hash + Ord> Inner<K> {
    fn push(&mut self, key: K) {
        if self.running.contains(&key) {
            self.again.insert(key);
        } else if self.waiting.insert(key.clone()) {
            self.ready.push_back(key);
        }
    }

    fn appoint(&mut self, key: K, at: Instant) {
        match self.due.get(&key) {
            Some(due) if *due <= at => return,
            Some(due) => {
                self.timers.remove(&(*due, key.clone()));
            }
            None => {}
        }
        self.due.insert(key.clone(), at);
        self.timers.insert((at, key));
    }

    fn cancel(&mut self, key: &K) {
        if let Some(due) = self.due.remove(key) {
            self.timers.remove(&(due, key.clone()));
        }
    }

    /// Pushes the keys whose time has come.
    fn ring(&mut self, now: Instant) {
        while let Some((at, key)) = self.timers.first().cloned() {
            if at > now {
                break;
            }
            self.cancel(&key);
            self.push(key);
        }
    }

    fn take(&mut self) -> Option<K> {
        let key = self.ready.pop_front()?;
        self.waiting.remove(&key);
        // Whoever looks at it now makes new appointments.
        self.cancel(&key);
        self.running.insert(key.clone());
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn taken(queue: &Queue<&'static str>) -> Option<&'static str> {
        // Long enough for every appointment below; time is paused, so it costs nothing.
        tokio::time::timeout(Duration::from_mins(1), queue.next())
            .await
            .ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_is_handed_out_once_however_often_pushed() {
        let queue = Queue::default();
        for key in ["a", "b", "a", "a"] {
            queue.push(key);
        }
        assert_eq!(taken(&queue).await, Some("a"));
        assert_eq!(taken(&queue).await, Some("b"));
        assert_eq!(taken(&queue).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_pushed_during_the_work_comes_back_after_it() {
        let queue = Queue::default();
        queue.push("a");
        assert_eq!(taken(&queue).await, Some("a"));
        queue.push("a");
        assert_eq!(taken(&queue).await, None, "one worker at a time");
        queue.done(&"a");
        assert_eq!(taken(&queue).await, Some("a"));
        queue.done(&"a");
        assert_eq!(taken(&queue).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_earliest_appointment_counts() {
        let queue = Queue::default();
        queue.push_after("a", Duration::from_secs(9));
        queue.push_after("a", Duration::from_secs(3));
        queue.push_after("a", Duration::from_secs(6));
        let begin = Instant::now();
        assert_eq!(taken(&queue).await, Some("a"));
        assert_eq!(begin.elapsed().as_secs(), 3);
        queue.done(&"a");
        assert_eq!(
            taken(&queue).await,
            None,
            "the later appointments were for the same work"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_are_retried_ever_later() {
        let queue = Queue::default();
        let mut pauses = Vec::new();
        for _ in 0..3 {
            queue.retry("a");
            let begin = Instant::now();
            assert_eq!(taken(&queue).await, Some("a"));
            pauses.push(begin.elapsed());
            queue.done(&"a");
        }
        assert!(pauses.is_sorted_by(|a, b| a < b), "{pauses:?}");
        queue.forgive(&"a");
        queue.retry("a");
        let begin = Instant::now();
        assert_eq!(taken(&queue).await, Some("a"));
        assert_eq!(begin.elapsed(), pauses[0]);
    }

    #[tokio::test(start_paused = true)]
    async fn idle_workers_share_a_burst() {
        let queue = std::sync::Arc::new(Queue::default());
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let queue = queue.clone();
                tokio::spawn(async move { queue.next().await })
            })
            .collect();
        tokio::task::yield_now().await;
        queue.push("a");
        queue.push("b");
        let mut got = Vec::new();
        for worker in workers {
            got.push(worker.await.unwrap());
        }
        got.sort_unstable();
        assert_eq!(got, ["a", "b"]);
    }
}
