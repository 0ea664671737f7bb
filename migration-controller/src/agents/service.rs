//! The gRPC service that agents attach to.

use std::sync::Arc;
use std::time::Duration;

use node_hooks_api::agent as wire;
use node_hooks_api::agent::agents_server::{Agents, AgentsServer};
use node_hooks_api::agent::from_agent::Message as Told;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::hub::{HEARTBEAT, Hub, Outbound, Ticket, not_leading};
use super::metrics::{AgentMetrics, End, Refusal};
use super::time::Nanos;

/// How long an agent has for its Hello.
const HELLO: Duration = Duration::from_secs(5);
/// How many heartbeats may fail to come.
const MISSED: u32 = 3;
/// Longer messages are nobody's who keeps to the protocol.
const LONGEST_MESSAGE: usize = 64 << 10;
/// How long a text of an agent's may be in the log.
const LONGEST_VERSION: usize = 64;

/// Who is at the other end of a connection, as its certificate says.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// The Kubernetes node.
    pub(super) node: Arc<str>,
}

/// The service.
pub(super) struct Service {
    pub(super) hub: Arc<Hub>,
    pub(super) metrics: AgentMetrics,
    pub(super) stop: CancellationToken,
}

impl Service {
    pub(super) fn server(self) -> AgentsServer<Self> {
        AgentsServer::new(self).max_decoding_message_size(LONGEST_MESSAGE)
    }

    fn refuse(&self, reason: Refusal, status: Status) -> Status {
        self.metrics.refused(reason);
        tracing::debug!(?reason, why = status.message(), "agent refused");
        status
    }
}

#[tonic::async_trait]
impl Agents for Service {
    type AttachStream = Outbound;

    async fn attach(
        &self,
        request: Request<Streaming<wire::FromAgent>>,
    ) -> Result<Response<Outbound>, Status> {
        let Some(Peer { node }) = request.extensions().get::<Peer>().cloned() else {
            let status = Status::unauthenticated("no certificate of a node's");
            return Err(self.refuse(Refusal::NoNode, status));
        };
        let mut told = request.into_inner();
        let hello = tokio::time::timeout(HELLO, told.message()).await;
        let hello = match hello {
            Ok(Ok(Some(wire::FromAgent {
                message: Some(Told::Hello(hello)),
            }))) => hello,
            Err(_) => {
                let status = Status::deadline_exceeded("no Hello");
                return Err(self.refuse(Refusal::NoHello, status));
            }
            Ok(_) => {
                let status = Status::invalid_argument("a Hello comes first");
                return Err(self.refuse(Refusal::NoHello, status));
            }
        };
        if hello.node != *node {
            let status = Status::permission_denied(format!(
                "the certificate is node {node}'s; it must be of the node that the agent is on"
            ));
            return Err(self.refuse(Refusal::OtherNode, status));
        }
        if hello.revision < node_hooks_api::OLDEST {
            let status = Status::failed_precondition(format!(
                "the controller gets on with revision {} and later ones, the agent has {}: update it",
                node_hooks_api::OLDEST,
                hello.revision
            ));
            return Err(self.refuse(Refusal::Revision, status));
        }
        let attached = self.hub.attach(&node);
        let (ticket, outbound) =
            attached.map_err(|_| self.refuse(Refusal::NotLeading, not_leading()))?;
        let version: String = hello.version.chars().take(LONGEST_VERSION).collect();
        tracing::info!(%node, version, revision = hello.revision, "agent connected");
        let (hub, stop) = (self.hub.clone(), self.stop.clone());
        tokio::spawn(async move {
            let (reason, status) = listen_to(&hub, &ticket, &mut told, &stop).await;
            hub.detach(&ticket, reason, status);
        });
        Ok(Response::new(outbound))
    }
}

/// Takes in what an agent says until it says no more. Says why.
async fn listen_to(
    hub: &Hub,
    ticket: &Ticket,
    told: &mut Streaming<wire::FromAgent>,
    stop: &CancellationToken,
) -> (End, Status) {
    let mut beat = tokio::time::interval(HEARTBEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_word = Instant::now();
    let mut number = 0;
    loop {
        tokio::select! {
            biased;
            message = told.message() => match message {
                Ok(Some(wire::FromAgent { message })) => {
                    let now = Nanos::now();
                    // Words of a newer agent that this controller does not know are skipped.
                    if let Some(message) = message {
                        let woken = hub.heard(ticket, message, now);
                        if !woken.is_empty() {
                            tokio::task::yield_now().await;
                            hub.wake(woken);
                        }
                    }
                    last_word = Instant::now();
                }
                Ok(None) | Err(_) => return (End::Closed, Status::cancelled("closed")),
            },
            () = ticket.gone() => return (End::Closed, Status::cancelled("gone")),
            () = stop.cancelled() => {
                return (End::NotLeading, Status::unavailable("this controller stops"));
            }
            _ = beat.tick() => {
                if last_word.elapsed() > HEARTBEAT * MISSED {
                    let status = Status::deadline_exceeded("the agent says nothing any more");
                    return (End::Silent, status);
                }
                number += 1;
                hub.beat(ticket, number);
            }
        }
    }
}
