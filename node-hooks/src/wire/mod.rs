//! The stream to the controller that leads: found, authenticated both ways, kept, and made again.
//!
//! # Guarantees
//! - What arrives is from who has a certificate for the controller's name by the authority in the
//!   directory of certificates, and the controller can tell the same of this node.
//! - Events come in order: [`Event::Up`], what was said, [`Event::Down`].
//! - A connection that does not answer is given up, and the next controller is tried.
//!
//! # Caveats
//! - What was said and not sent when a stream is lost is gone: the state machine tells it again where
//!   that matters.

mod attempt;
mod outbox;
mod session;
#[cfg(test)]
#[path = "../../tests/support/controller.rs"]
mod test_controller;
#[cfg(test)]
#[path = "../../tests/support/pki.rs"]
mod test_pki;
#[cfg(test)]
mod tests;
mod tls;

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use node_hooks_api::agent::to_agent;
use rustls::pki_types::ServerName;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::time::Nanos;
pub use outbox::Outbox;
use session::Ended;
use tls::Credentials;
pub use tls::TlsError;

/// The pause before the second round of attempts; it doubles from there, with as much jitter.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause, before jitter: a controller that comes back has its agents within seconds.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);
/// A stream that lived this long did well: the next begins at once.
const DID_WELL: Duration = Duration::from_secs(5);

/// Where a controller may be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Controller {
    host: String,
    port: u16,
}

/// `HOST:PORT` was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected HOST:PORT or [IPV6]:PORT")]
pub struct NoController;

/// Whom to reach, as who.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node's name in Kubernetes.
    pub node: String,
    /// Where controllers may be; a name may have several addresses.
    pub controllers: Vec<Controller>,
    /// What a controller's certificate has to name.
    pub controller_name: ServerName<'static>,
    /// Where `tls.crt`, `tls.key` and `ca.crt` are.
    pub tls_dir: PathBuf,
}

/// What happens on the link.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A controller that leads has welcomed this agent.
    Up,
    /// It said something.
    Said {
        /// What.
        message: to_agent::Message,
        /// When it arrived here.
        received: Nanos,
    },
    /// The stream is lost.
    Down,
}

/// Whether there is a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Attempts are being made.
    Connecting {
        /// What ended the last stream or round of attempts.
        last_error: Option<String>,
    },
    /// There is one.
    Connected {
        /// The controller's address.
        address: SocketAddr,
        /// The controller's version, as it says.
        version: String,
    },
}

/// Makes streams for as long as it runs.
pub struct Link {
    config: Config,
    credentials: Credentials,
    outbox: Outbox,
    events: mpsc::Sender<Event>,
    state: watch::Sender<State>,
    /// Whether something is armed: a bad time to make the connection anew without need.
    busy: watch::Receiver<bool>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
}

/// How one attempt at a controller went.
enum Round {
    Served {
        address: SocketAddr,
        for_long: bool,
        ended: Ended,
    },
    Nobody(String),
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Controller {
    type Err = NoController;

    fn from_str(text: &str) -> Result<Self, NoController> {
        let (host, port) = text.rsplit_once(':').ok_or(NoController)?;
        let port = port.parse().map_err(|_| NoController)?;
        let bracketed = host
            .strip_prefix('[')
            .map(|host| host.strip_suffix(']').ok_or(NoController))
            .transpose()?;
        let host = match bracketed {
            Some(host) => host,
            None if host.contains(':') => return Err(NoController),
            None => host,
        };
        if host.is_empty() || port == 0 {
            return Err(NoController);
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl Link {
    /// A link that does nothing until it runs, and where its events and its state come out.
    pub fn new(
        config: Config,
        outbox: Outbox,
        busy: watch::Receiver<bool>,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> (Self, mpsc::Receiver<Event>, watch::Receiver<State>) {
        let (events, receiver) = mpsc::channel(256);
        let (state, state_receiver) = watch::channel(State::Connecting { last_error: None });
        let link = Self {
            credentials: Credentials::new(config.tls_dir.clone()),
            config,
            outbox,
            events,
            state,
            busy,
            metrics,
            stop,
        };
        (link, receiver, state_receiver)
    }

    /// Runs until it is stopped, or nobody takes its events any more.
    pub async fn run(mut self) {
        let mut pauses = pauses();
        let mut preferred = None;
        let mut said = None;
        loop {
            let stop = self.stop.clone();
            let round = Box::pin(self.round(preferred));
            let Some(round) = stop.run_until_cancelled(round).await else {
                return;
            };
            let error = match round {
                Round::Served {
                    ended: Ended::Stopped,
                    ..
                } => return,
                Round::Served {
                    address,
                    for_long,
                    ended,
                } => {
                    self.metrics.disconnected();
                    preferred = Some(address);
                    said = None;
                    let error = ended.to_string();
                    tracing::info!(controller = %address, reason = error, "stream ended");
                    if for_long || matches!(ended, Ended::Renewed) {
                        pauses = self::pauses();
                        self.state.send_replace(State::Connecting {
                            last_error: Some(error),
                        });
                        continue;
                    }
                    error
                }
                Round::Nobody(error) => {
                    // Once for each reason: a controller that is away for a day is one line.
                    if said.as_ref() == Some(&error) {
                        tracing::debug!(error, "no controller");
                    } else {
                        tracing::warn!(error, "no controller; trying again");
                        said = Some(error.clone());
                    }
                    error
                }
            };
            self.state.send_replace(State::Connecting {
                last_error: Some(error),
            });
            let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
            let pause = tokio::time::sleep(pause);
            if self.stop.run_until_cancelled(pause).await.is_none() {
                return;
            }
        }
    }

    /// Tries every address once, until one serves.
    async fn round(&mut self, preferred: Option<SocketAddr>) -> Round {
        let tls = match self.credentials.load().await {
            Ok(tls) => tls,
            Err(error) => return Round::Nobody(crate::chain(&error)),
        };
        let (addresses, mut errors) = self.addresses(preferred).await;
        for address in addresses {
            let name = self.config.controller_name.clone();
            let attached = async {
                let io = attempt::connect(address, tls.clone(), name).await?;
                let name = self.config.controller_name.to_str();
                session::attach(io, &name, &self.config.node, &self.outbox).await
            };
            let attached = match attached.await {
                Ok(attached) => attached,
                Err(error) => {
                    errors.insert(format!("{address}: {}", crate::chain(&error)));
                    continue;
                }
            };
            let version = attached.version().to_owned();
            tracing::info!(controller = %address, version, "welcomed by the controller");
            self.metrics.connected();
            self.state
                .send_replace(State::Connected { address, version });
            let begun = Instant::now();
            let ended = session::Session {
                attached,
                outbox: &self.outbox,
                events: &self.events,
                credentials: &self.credentials,
                busy: &mut self.busy,
                metrics: &self.metrics,
                stop: &self.stop,
            };
            let ended = ended.run().await;
            return Round::Served {
                address,
                for_long: begun.elapsed() >= DID_WELL,
                ended,
            };
        }
        Round::Nobody(errors.into_iter().collect::<Vec<_>>().join("; "))
    }

    /// Where to try, the preferred first, and what could not be resolved.
    async fn addresses(
        &self,
        preferred: Option<SocketAddr>,
    ) -> (Vec<SocketAddr>, BTreeSet<String>) {
        let (mut addresses, mut errors) = (Vec::new(), BTreeSet::new());
        for controller in &self.config.controllers {
            match attempt::resolve(controller).await {
                Ok(found) => addresses.extend(found),
                Err(error) => {
                    errors.insert(crate::chain(&error));
                }
            }
        }
        let mut seen = BTreeSet::new();
        addresses.retain(|address| seen.insert(*address));
        // Stable: the rest stays as it was named.
        addresses.sort_by_key(|address| preferred != Some(*address));
        (addresses, errors)
    }
}

fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(SHORTEST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}
