//! KubeVirt's node hook: virt-handler asks, before a migration's copy begins, and waits for the answer.
//!
//! # Guarantees
//! - A call ends: with the controller's word, or at the deadline as the command line says.
//! - A call that is cancelled leaves nothing behind.
//! - A question that comes twice gets one answer.

mod socket;
#[cfg(test)]
mod tests;
mod vmi;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use node_hooks_api::agent::gate_answer::Verdict;
use node_hooks_api::kubevirt::node_hook_service_server::{NodeHookService, NodeHookServiceServer};
use node_hooks_api::kubevirt::{ExecuteNodeHookRequest, ExecuteNodeHookResponse};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::core::{Call, Instance};
use crate::metrics::{GateResult, Metrics};
pub use socket::{Socket, SocketError};

/// The hook point that is a gate. At all others there is nothing to wait for.
const GATE: &str = "PreMigrationSource";
/// The most calls at a time. KubeVirt migrates two VMs of a node at a time unless told otherwise.
const MOST_CALLS: usize = 256;
/// The most connections at a time: virt-handler makes one for each call.
const MOST_CONNECTIONS: usize = 256;
/// The longest request that is taken: the API server's limit for an object is 1.5 MiB.
const LONGEST: usize = 4 << 20;
/// How long calls may take to be answered once everything stops.
const GRACE: Duration = Duration::from_secs(2);

/// What a migration does at the deadline, when the controller has not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnTimeout {
    /// It goes: the network follows as it can.
    Ignore,
    /// It is refused, before anything was copied; KubeVirt asks again.
    Fail,
}

/// How long to wait for the controller, and what then.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Below virt-handler's own, or the caller is gone before the answer.
    pub deadline: Duration,
    /// What then.
    pub on_timeout: OnTimeout,
}

/// What a call is about, and that its caller is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A call came.
    Asked {
        /// Which.
        call: Call,
        /// What it is about.
        about: Instance,
    },
    /// Its caller waits no more, and has no answer.
    Withdrawn {
        /// Which.
        call: Call,
    },
}

/// The calls that wait for an answer.
#[derive(Clone, Debug)]
pub struct Gate {
    calls: Arc<Mutex<HashMap<Call, oneshot::Sender<Answer>>>>,
    last: Arc<AtomicU64>,
    /// Its length is bounded by the number of calls.
    events: mpsc::UnboundedSender<Event>,
}

#[derive(Clone, Debug)]
struct Answer {
    verdict: Verdict,
    reason: String,
}

/// A call that waits: when it is dropped without an answer, that is said.
struct Waiting {
    gate: Gate,
    call: Call,
    answer: oneshot::Receiver<Answer>,
}

/// The service.
#[derive(Clone)]
struct Hook {
    gate: Gate,
    patience: Patience,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
}

impl Gate {
    /// No calls yet, and where what happens to them comes out.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let gate = Self {
            calls: Arc::default(),
            last: Arc::default(),
            events,
        };
        (gate, receiver)
    }

    /// Answers calls.
    pub fn answer(&self, calls: BTreeSet<Call>, verdict: Verdict, reason: &str) {
        let mut waiting = self.lock();
        for call in calls {
            if let Some(waiting) = waiting.remove(&call) {
                // The caller may have gone this very moment.
                let _ = waiting.send(Answer {
                    verdict,
                    reason: reason.to_owned(),
                });
            }
        }
    }

    fn ask(&self, about: Instance) -> Result<Waiting, Status> {
        let call = Call(self.last.fetch_add(1, Ordering::Relaxed));
        let (sender, answer) = oneshot::channel();
        let mut waiting = self.lock();
        if waiting.len() >= MOST_CALLS {
            return Err(Status::resource_exhausted(format!(
                "{MOST_CALLS} migrations wait already"
            )));
        }
        waiting.insert(call, sender);
        drop(waiting);
        let _ = self.events.send(Event::Asked { call, about });
        Ok(Waiting {
            gate: self.clone(),
            call,
            answer,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Call, oneshot::Sender<Answer>>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let call = self.call;
        if self.gate.lock().remove(&call).is_some() {
            let _ = self.gate.events.send(Event::Withdrawn { call });
        }
    }
}

impl Hook {
    async fn may_migrate(&self, vmi: &[u8]) -> Result<(), Status> {
        let about = vmi::read(vmi).map_err(|wrong| {
            self.metrics.gate(GateResult::Malformed);
            Status::invalid_argument(wrong.to_string())
        })?;
        let name = format!("{}/{}", about.namespace, about.name);
        tracing::debug!(
            vm = name,
            migration = about.migration_uid,
            "asked whether it may migrate"
        );
        let mut waiting = self.gate.ask(about)?;
        let mut cancelled = Cancelled(Some(&self.metrics));
        let answer = tokio::select! {
            biased;
            answer = timeout(self.patience.deadline, &mut waiting.answer) => answer.ok(),
            () = self.stop.cancelled() => None,
        };
        cancelled.0 = None;
        match answer {
            Some(Ok(answer)) => self.decided(&name, answer),
            Some(Err(_)) | None => self.undecided(&name),
        }
    }

    fn decided(&self, vm: &str, answer: Answer) -> Result<(), Status> {
        let reason = answer.reason;
        match answer.verdict {
            Verdict::Go => {
                self.metrics.gate(GateResult::Go);
                tracing::info!(vm, reason, "may migrate");
                Ok(())
            }
            Verdict::GoUnprepared => {
                self.metrics.gate(GateResult::GoUnprepared);
                tracing::warn!(vm, reason, "migrates although its network is not ready");
                Ok(())
            }
            Verdict::Fail | Verdict::Unspecified => {
                self.metrics.gate(GateResult::Fail);
                tracing::warn!(vm, reason, "must not migrate");
                Err(Status::failed_precondition(format!("segue: {reason}")))
            }
        }
    }

    fn undecided(&self, vm: &str) -> Result<(), Status> {
        let Patience {
            deadline,
            on_timeout,
        } = self.patience;
        let reason = if self.stop.is_cancelled() {
            "the agent stops".to_owned()
        } else {
            format!("the controller has not answered for {deadline:?}")
        };
        match on_timeout {
            OnTimeout::Ignore => {
                self.metrics.gate(GateResult::TimeoutIgnored);
                tracing::warn!(vm, reason, "migrates unasked");
                Ok(())
            }
            OnTimeout::Fail => {
                self.metrics.gate(GateResult::TimeoutFailed);
                tracing::warn!(vm, reason, "must not migrate");
                Err(Status::failed_precondition(format!(
                    "segue: {reason}: is a controller running, and does it reach this node's agent?"
                )))
            }
        }
    }
}

/// Counts a call that ends before it is answered.
struct Cancelled<'a>(Option<&'a Metrics>);

impl Drop for Cancelled<'_> {
    fn drop(&mut self) {
        if let Some(metrics) = self.0 {
            metrics.gate(GateResult::Cancelled);
        }
    }
}

#[tonic::async_trait]
impl NodeHookService for Hook {
    async fn execute_node_hook(
        &self,
        request: Request<ExecuteNodeHookRequest>,
    ) -> Result<Response<ExecuteNodeHookResponse>, Status> {
        let request = request.into_inner();
        if request.hook_point == GATE {
            self.may_migrate(&request.vmi).await?;
        }
        Ok(Response::new(ExecuteNodeHookResponse {}))
    }
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hook").finish_non_exhaustive()
    }
}

/// Serves the hook on `socket` until `stop`; calls that wait then are answered as at the deadline.
pub async fn serve(
    socket: Socket,
    gate: Gate,
    patience: Patience,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) {
    let service = NodeHookServiceServer::new(Hook {
        gate,
        patience,
        metrics,
        stop: stop.clone(),
    });
    let service = service.max_decoding_message_size(LONGEST);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = socket.accept(), if connections.len() < MOST_CONNECTIONS => match accepted {
                Ok(stream) => {
                    connections.spawn(connection(stream, service.clone(), stop.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "connection to the node hook not accepted");
                    // Out of descriptors, most likely: without a pause the loop would spin.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
    drop(socket);
    let all = async { while connections.join_next().await.is_some() {} };
    if timeout(GRACE, all).await.is_err() {
        tracing::debug!("callers of the node hook hang on");
    }
}

async fn connection(
    stream: UnixStream,
    service: NodeHookServiceServer<Hook>,
    stop: CancellationToken,
) {
    let serving = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(64)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let mut serving = std::pin::pin!(serving);
    let served = tokio::select! {
        served = &mut serving => served,
        () = stop.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(
            error = crate::chain(&error),
            "connection to the node hook ended badly"
        );
    }
}
