//! Listening to one hypervisor for as long as it is there.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::lifecycle::{Domains, Happened};
use super::{Counts, LifecycleEvent, Origin};

/// The first pause before connecting again; each further one is twice as long.
const SHORTEST: Duration = Duration::from_millis(100);
/// The longest: a migration takes seconds to begin, and one that begins meanwhile goes without the acceleration.
const LONGEST: Duration = Duration::from_secs(5);
/// The pause after a daemon said no: it notes each refusal in its log, and seldom changes its mind. Some do once they
/// have started.
const REFUSED: Duration = Duration::from_mins(1);
/// A connection that lasts so long has worked: the next pause is the shortest again.
const LASTING: Duration = Duration::from_secs(10);

/// A hypervisor that tells what happens to its domains.
pub(super) trait Hypervisor: Send + Sync {
    /// Ends with everything it has opened or started when it is dropped.
    type Connection: Connection;

    /// Connects, within a deadline of its own.
    fn connect(&self) -> impl Future<Output = Result<Self::Connection, SourceError>> + Send;
}

/// Something that a hypervisor tells through.
pub(super) trait Connection: Send {
    /// The next thing that happens.
    fn next(&mut self) -> impl Future<Output = Result<Happened, SourceError>> + Send;
}

/// Why a hypervisor tells nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum SourceError {
    /// There is no such socket any more.
    #[error("its socket is gone")]
    Gone,
    #[error("cannot start {program} (--virsh names the program)")]
    Start { program: String, source: io::Error },
    #[error("no answer within {0:?}; is the daemon behind it stopped?")]
    Deadline(Duration),
    #[error("ended: {0}")]
    Ended(String),
    #[error("cannot be read")]
    Io(#[from] io::Error),
    #[error("does not speak QMP: {0}")]
    Qmp(String),
    #[error("does not pass on QEMU's events (--libvirt-read-only does without)")]
    Monitors(#[source] libvirt_rpc::Error),
    #[error(
        "none of {} is there (--libvirt-uri 'qemu+unix:///system?socket=PATH' names another)",
        list(.0)
    )]
    NoSocket(Vec<PathBuf>),
}

impl From<libvirt_rpc::Error> for SourceError {
    fn from(error: libvirt_rpc::Error) -> Self {
        match error {
            libvirt_rpc::Error::Io(error) => Self::Io(error),
            libvirt_rpc::Error::Closed => Self::Ended(error.to_string()),
            _ => Self::Monitors(error),
        }
    }
}

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    paths.join(", ")
}

impl SourceError {
    /// A socket that was found cannot be reached.
    pub(super) fn reaching(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Gone,
            _ => Self::Io(error),
        }
    }
}

/// Which of the domains that a hypervisor names are believed to be its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Domain {
    /// All of them: it is the node's.
    Any,
    /// The first one it names. A launcher runs one guest; one that has been taken over is not to speak for others'.
    First,
}

/// Where a hypervisor's news go.
pub(super) struct Follower {
    /// Of the hypervisor, for people.
    pub(super) name: String,
    pub(super) origin: Origin,
    pub(super) counted: Counted,
    pub(super) believed: Domain,
    pub(super) counts: Arc<Counts>,
    pub(super) events: mpsc::Sender<LifecycleEvent>,
    pub(super) state: State,
}

/// As what it is counted while it is listened to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counted {
    Hypervisor,
    /// Beside another, of the same hypervisor.
    Monitors,
}

/// What outlasts a connection.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) domains: Domains,
    /// The first that was named, by whichever feed of the daemon.
    pub(super) only: Arc<OnceLock<String>>,
}

/// Counts a connection for as long as it is one.
struct Connected<'a>(&'a AtomicU64);

// === impl Follower ===

impl Follower {
    /// Listens, and connects again whenever it must. Returns when the hypervisor's socket is gone or nobody listens.
    pub(super) async fn follow<H: Hypervisor>(mut self, hypervisor: H) {
        let mut delays = delays();
        // Not at every attempt.
        let mut warned = false;
        loop {
            let name = self.name.clone();
            match hypervisor.connect().await {
                Ok(connection) => {
                    tracing::info!(hypervisor = name, "listening");
                    let began = Instant::now();
                    let Some(error) = self.listen(connection).await else {
                        return;
                    };
                    tracing::info!(hypervisor = name, error = cause(&error), "ended");
                    if began.elapsed() >= LASTING {
                        delays = self::delays();
                    }
                    warned = false;
                }
                Err(SourceError::Gone) => {
                    tracing::info!(hypervisor = name, "gone");
                    return;
                }
                Err(error) => {
                    if warned {
                        tracing::debug!(hypervisor = name, error = cause(&error));
                    } else {
                        tracing::warn!(hypervisor = name, error = cause(&error), "cannot be heard");
                        warned = true;
                    }
                    if matches!(error, SourceError::Monitors(_)) {
                        sleep(REFUSED).await;
                        continue;
                    }
                }
            }
            sleep(delays.next().unwrap_or(LONGEST)).await;
        }
    }

    /// Passes on what a connection tells, until it ends; none if nobody listens.
    async fn listen(&mut self, mut connection: impl Connection) -> Option<SourceError> {
        let counts = self.counts.clone();
        let _connected = Connected::new(&counts, self.counted);
        loop {
            let happened = match connection.next().await {
                Ok(happened) => happened,
                Err(error) => return Some(error),
            };
            if let Some(event) = self.event(happened)
                && self.events.send(event).await.is_err()
            {
                return None;
            }
        }
    }

    fn event(&mut self, happened: Happened) -> Option<LifecycleEvent> {
        let Happened {
            domain,
            change,
            at,
            seen,
        } = happened;
        if self.believed == Domain::First {
            let only = self.state.only.get_or_init(|| domain.clone());
            if *only != domain {
                self.counts.disbelieved.fetch_add(1, Relaxed);
                tracing::debug!(hypervisor = self.name, domain, only, "not its guest");
                return None;
            }
        }
        let sign = self.state.domains.sign(&domain, change)?;
        Some(LifecycleEvent {
            domain,
            sign,
            origin: self.origin,
            // A stamp from the future is no stamp.
            at: at.min(seen),
            seen,
        })
    }
}

impl<'a> Connected<'a> {
    fn new(counts: &'a Counts, counted: Counted) -> Self {
        let now = match counted {
            Counted::Hypervisor => &counts.connected,
            Counted::Monitors => &counts.monitors,
        };
        counts.connections.fetch_add(1, Relaxed);
        now.fetch_add(1, Relaxed);
        Self(now)
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

fn delays() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::new()
        .with_min_delay(SHORTEST)
        .with_max_delay(LONGEST)
        .with_jitter()
        .without_max_times()
        .build()
}

/// With its sources, which tracing prints.
fn cause(error: &SourceError) -> &(dyn std::error::Error + 'static) {
    error
}

#[cfg(test)]
mod tests;
