//! One stream: attached to a controller, kept alive, ended.

use std::fmt;
use std::future::ready;
use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use node_hooks_api::agent::agents_client::AgentsClient;
use node_hooks_api::agent::{Heartbeat, Hello, ToAgent, Welcome, from_agent, to_agent};
use node_hooks_api::{OLDEST, REVISION};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Status, Streaming};
use tower::service_fn;

use super::Event;
use super::attempt::{AttemptError, WELCOME};
use super::outbox::Outbox;
use super::tls::Credentials;
use crate::metrics::Metrics;
use crate::time::Nanos;

/// How often HTTP/2 itself asks whether the other end is there, and how long it waits for the answer.
const PING: Duration = Duration::from_secs(10);
const PONG: Duration = Duration::from_secs(5);
/// Between which bounds a controller may set the heartbeat, and what it is where it sets none.
const FASTEST_BEAT: Duration = Duration::from_millis(100);
const SLOWEST_BEAT: Duration = Duration::from_mins(1);
const USUAL_BEAT: Duration = Duration::from_secs(2);
/// A stream without a word for so many beats is given up.
const MISSED: u32 = 3;
/// How often the files of certificates are looked at.
const LOOK: Duration = Duration::from_secs(10);
/// For how long a new certificate waits for a moment when nothing is armed.
const PATIENCE: Duration = Duration::from_mins(5);
/// The longest message that is taken from a controller: the largest Arm that makes sense is shorter.
const LONGEST: usize = 1 << 20;

/// A stream on which the controller has welcomed this agent.
pub(super) struct Attached {
    inbound: Streaming<ToAgent>,
    welcome: Welcome,
    /// The connection lives for as long as this.
    _client: AgentsClient<Channel>,
}

/// A stream, and what it needs to be kept.
pub(super) struct Session<'a> {
    pub(super) attached: Attached,
    pub(super) outbox: &'a Outbox,
    pub(super) events: &'a mpsc::Sender<Event>,
    pub(super) credentials: &'a Credentials,
    pub(super) busy: &'a mut watch::Receiver<bool>,
    pub(super) metrics: &'a Metrics,
    pub(super) stop: &'a CancellationToken,
}

/// Why a stream ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// This process stops, or nobody listens.
    Stopped,
    /// The certificates are new ones.
    Renewed,
    /// The controller ended it in good order.
    Closed,
    /// It broke.
    Lost(Status),
    /// The controller said nothing any more.
    Silent(Duration),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopping"),
            Self::Renewed => f.write_str("the certificates were renewed"),
            Self::Closed => f.write_str("the controller ended it"),
            Self::Lost(status) => write!(f, "{}", crate::chain(status)),
            Self::Silent(beat) => write!(f, "nothing was heard for {MISSED} times {beat:?}"),
        }
    }
}

/// Says hello on a connection, and waits for the welcome.
pub(super) async fn attach<S>(
    io: S,
    authority: &str,
    node: &str,
    outbox: &Outbox,
) -> Result<Attached, AttemptError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let attaching = async {
        // The scheme is not looked at: the connection is there, and is TLS.
        let endpoint = Endpoint::from_shared(format!("http://{authority}"))
            .map_err(AttemptError::Http)?
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PONG)
            .keep_alive_while_idle(true);
        let mut io = Some(TokioIo::new(io));
        let connector = service_fn(move |_: Uri| {
            // Once: a connection that breaks is made again by whoever made this one.
            ready(
                io.take()
                    .ok_or(io::Error::from(io::ErrorKind::NotConnected)),
            )
        });
        let channel = endpoint.connect_with_connector(connector).await;
        let mut client = AgentsClient::new(channel.map_err(AttemptError::Http)?)
            .max_decoding_message_size(LONGEST);
        let hello = Hello {
            revision: REVISION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: node.to_owned(),
        };
        let outgoing = outbox.stream(from_agent::Message::Hello(hello));
        let mut inbound = client.attach(outgoing).await?.into_inner();
        let first = inbound.message().await?;
        let Some(to_agent::Message::Welcome(welcome)) = first.and_then(|first| first.message)
        else {
            return Err(AttemptError::NoWelcome);
        };
        // A newer controller knows what it must not ask of this agent, or has refused it.
        if welcome.revision < OLDEST {
            let theirs = welcome.revision;
            return Err(AttemptError::Revision { theirs });
        }
        Ok(Attached {
            inbound,
            welcome,
            _client: client,
        })
    };
    let after = WELCOME;
    let slow = |_| AttemptError::TooSlow {
        what: "the welcome",
        after,
    };
    timeout(after, attaching).await.map_err(slow)?
}

impl Attached {
    pub(super) fn version(&self) -> &str {
        &self.welcome.version
    }

    fn beat(&self) -> Duration {
        match self.welcome.heartbeat_ms {
            0 => USUAL_BEAT,
            ms => Duration::from_millis(ms.into()).clamp(FASTEST_BEAT, SLOWEST_BEAT),
        }
    }
}

/// The heartbeat of this end.
struct Beat {
    number: u64,
    sent: Instant,
    missed: u32,
}

impl Session<'_> {
    /// Passes on what the controller says until the stream ends.
    pub(super) async fn run(mut self) -> Ended {
        if self.tell(Event::Up).await.is_none() {
            return Ended::Stopped;
        }
        let ended = self.serve().await;
        if self.tell(Event::Down).await.is_none() {
            return Ended::Stopped;
        }
        ended
    }

    async fn serve(&mut self) -> Ended {
        let every = self.attached.beat();
        let mut beats = interval(every);
        // After this process was frozen it looks again before it gives up.
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut renewed: Option<Instant> = None;
        let mut beat = Beat {
            number: 0,
            sent: Instant::now(),
            missed: 0,
        };
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Ended::Stopped,
                said = self.attached.inbound.message() => {
                    let received = Nanos::now();
                    beat.missed = 0;
                    let said = match said {
                        Ok(Some(said)) => said,
                        Ok(None) => return Ended::Closed,
                        Err(status) => return Ended::Lost(status),
                    };
                    if self.take(said, received, &beat).await.is_none() {
                        return Ended::Stopped;
                    }
                }
                _ = beats.tick() => {
                    if beat.missed == MISSED {
                        return Ended::Silent(every);
                    }
                    beat.missed += 1;
                    beat.number += 1;
                    beat.sent = Instant::now();
                    self.say_heartbeat(beat.number, false);
                }
                _ = looks.tick(), if renewed.is_none() => {
                    match self.credentials.are_renewed().await {
                        Ok(true) => renewed = Some(Instant::now()),
                        Ok(false) => {}
                        Err(error) => {
                            let error = crate::chain(&error);
                            tracing::warn!(error, "the certificates changed, and cannot be used");
                        }
                    }
                }
                () = idle(self.busy, renewed) => return Ended::Renewed,
            }
        }
    }

    /// None where nobody listens or everything stops.
    async fn take(&self, said: ToAgent, received: Nanos, beat: &Beat) -> Option<()> {
        match said.message {
            Some(to_agent::Message::Heartbeat(heard)) => self.heard(heard, beat),
            Some(message) => self.tell(Event::Said { message, received }).await?,
            // Of a later revision.
            None => {}
        }
        Some(())
    }

    fn heard(&self, heartbeat: Heartbeat, beat: &Beat) {
        if !heartbeat.answer {
            self.say_heartbeat(heartbeat.number, true);
        } else if heartbeat.number == beat.number {
            self.metrics.answered(beat.sent.elapsed());
        }
    }

    fn say_heartbeat(&self, number: u64, answer: bool) {
        self.outbox
            .push(from_agent::Message::Heartbeat(Heartbeat { number, answer }));
    }

    /// None where nobody listens or everything stops.
    async fn tell(&self, event: Event) -> Option<()> {
        let told = self.stop.run_until_cancelled(self.events.send(event));
        told.await?.ok()
    }
}

/// The moment to make the connection anew with what was `renewed`: when nothing is armed, or when it
/// has waited for that long enough.
async fn idle(busy: &mut watch::Receiver<bool>, renewed: Option<Instant>) {
    let Some(renewed) = renewed else {
        return std::future::pending().await;
    };
    let patience = tokio::time::sleep_until(renewed + PATIENCE);
    tokio::select! {
        Ok(_) = busy.wait_for(|busy| !*busy) => {}
        () = patience => {}
    }
}
