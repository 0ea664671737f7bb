use std::collections::VecDeque;
use std::sync::Mutex;

use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::signals::Sign;
use crate::signals::lifecycle::Change;
use crate::time::Nanos;

const PAUSED: Change = Change::Suspended { migrating: true };
const RESUMED: Change = Change::Resumed { migrated: true };

/// What becomes of each attempt to connect, and when there was one. When there is nothing more to become of it, the
/// socket is gone.
#[derive(Default)]
struct Scripted {
    attempts: Mutex<VecDeque<Attempt>>,
    times: Arc<Mutex<Vec<Instant>>>,
}

enum Attempt {
    Refused,
    /// By a daemon that has no monitors' events for this client.
    Denied,
    /// After what is told, it lasts for so long, and ends.
    Connected(VecDeque<Happened>, Duration),
}

struct Telling(VecDeque<Happened>, Duration);

impl Hypervisor for Scripted {
    type Connection = Telling;

    async fn connect(&self) -> Result<Telling, SourceError> {
        self.times.lock().unwrap().push(Instant::now());
        match self.attempts.lock().unwrap().pop_front() {
            None => Err(SourceError::Gone),
            Some(Attempt::Denied) => Err(SourceError::Monitors(libvirt_rpc::Error::Refused {
                code: 29,
                text: "read only".to_owned(),
            })),
            Some(Attempt::Refused) => Err(SourceError::Ended("refused".to_owned())),
            Some(Attempt::Connected(told, lasts)) => Ok(Telling(told, lasts)),
        }
    }
}

impl Connection for Telling {
    async fn next(&mut self) -> Result<Happened, SourceError> {
        if let Some(happened) = self.0.pop_front() {
            return Ok(happened);
        }
        sleep(self.1).await;
        Err(SourceError::Ended("over".to_owned()))
    }
}

struct Following {
    events: mpsc::Receiver<LifecycleEvent>,
    counts: Arc<Counts>,
    times: Arc<Mutex<Vec<Instant>>>,
    task: JoinHandle<()>,
}

fn follow(believed: Domain, attempts: impl IntoIterator<Item = Attempt>) -> Following {
    let (sender, events) = mpsc::channel(16);
    let counts = Arc::<Counts>::default();
    let hypervisor = Scripted {
        attempts: Mutex::new(attempts.into_iter().collect()),
        times: Arc::default(),
    };
    let follower = Follower {
        name: "a test".to_owned(),
        origin: Origin::Libvirt,
        counted: Counted::Hypervisor,
        believed,
        counts: counts.clone(),
        events: sender,
        state: State::default(),
    };
    Following {
        events,
        counts,
        times: hypervisor.times.clone(),
        task: tokio::spawn(follower.follow(hypervisor)),
    }
}

fn happened(domain: &str, change: Change) -> Happened {
    Happened {
        domain: domain.to_owned(),
        change,
        at: Nanos(5),
        seen: Nanos(9),
    }
}

fn connected(told: impl IntoIterator<Item = Happened>, lasts: Duration) -> Attempt {
    Attempt::Connected(told.into_iter().collect(), lasts)
}

impl Following {
    async fn signs(mut self) -> Vec<(String, Sign)> {
        let mut signs = Vec::new();
        while let Some(event) = self.events.recv().await {
            signs.push((event.domain, event.sign));
        }
        signs
    }
}

#[tokio::test(start_paused = true)]
async fn a_pause_is_remembered_when_the_connection_is_lost() {
    let following = follow(
        Domain::Any,
        [
            connected([happened("a", PAUSED)], Duration::ZERO),
            Attempt::Refused,
            connected([happened("a", RESUMED)], Duration::ZERO),
        ],
    );
    let counts = following.counts.clone();
    let expected = [
        ("a".to_owned(), Sign::Paused),
        ("a".to_owned(), Sign::ResumedAfterFailure),
    ];
    assert_eq!(following.signs().await, expected);
    assert_eq!(counts.connections.load(Relaxed), 2);
    assert_eq!(counts.connected.load(Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn attempts_become_rarer_until_a_connection_lasts() {
    let refused = || std::iter::repeat_with(|| Attempt::Refused).take(10);
    let lasting = connected([], LASTING);
    let following = follow(
        Domain::Any,
        refused().chain([lasting]).chain([Attempt::Refused]),
    );
    let times = following.times.clone();
    following.task.await.unwrap();
    let times = times.lock().unwrap();
    let pauses: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // Jitter at most doubles a pause.
    assert!(
        pauses[0] >= SHORTEST && pauses[0] <= SHORTEST * 2,
        "{pauses:?}"
    );
    assert!(
        pauses[9] >= LONGEST && pauses[9] <= LONGEST * 2,
        "{pauses:?}"
    );
    let after = pauses[10].saturating_sub(LASTING);
    assert!(after >= SHORTEST && after <= SHORTEST * 2, "{pauses:?}");
}

#[tokio::test(start_paused = true)]
async fn a_launcher_speaks_for_one_guest() {
    let told = || {
        [
            happened("mine", Change::Resumed { migrated: false }),
            happened("another", PAUSED),
            happened("mine", PAUSED),
        ]
    };
    let following = follow(
        Domain::First,
        [
            connected(told(), Duration::ZERO),
            connected([happened("another", PAUSED)], Duration::ZERO),
        ],
    );
    let counts = following.counts.clone();
    assert_eq!(following.signs().await, [("mine".to_owned(), Sign::Paused)]);
    assert_eq!(counts.disbelieved.load(Relaxed), 2);
    let following = follow(Domain::Any, [connected(told(), Duration::ZERO)]);
    assert_eq!(following.signs().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_stamp_from_the_future_is_not_believed() {
    let late = Happened {
        at: Nanos(100),
        ..happened("a", PAUSED)
    };
    let mut following = follow(Domain::Any, [connected([late], Duration::ZERO)]);
    let event = following.events.recv().await.unwrap();
    assert_eq!((event.at, event.seen), (Nanos(9), Nanos(9)));
}

#[tokio::test(start_paused = true)]
async fn it_ends_when_nobody_listens() {
    let again = || connected([happened("a", PAUSED)], Duration::ZERO);
    let following = follow(Domain::Any, std::iter::repeat_with(again).take(1000));
    drop(following.events);
    let ended = timeout(Duration::from_mins(1), following.task).await;
    ended.expect("it goes on").unwrap();
    assert_eq!(following.times.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_says_no_is_asked_again_once_a_minute() {
    let told = [happened("a", PAUSED)];
    let attempts = [
        Attempt::Denied,
        Attempt::Denied,
        connected(told, Duration::ZERO),
    ];
    let following = follow(Domain::Any, attempts);
    let times = following.times.clone();
    assert_eq!(following.signs().await, [("a".to_owned(), Sign::Paused)]);
    let times = times.lock().unwrap();
    let waited = |earlier: usize| times[earlier + 1].duration_since(times[earlier]);
    for wait in [waited(0), waited(1)] {
        assert!(REFUSED <= wait && wait < REFUSED + SHORTEST, "{wait:?}");
    }
}
