//! Board, desk and the queues to the agents, behind one lock that is never held across an await.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt, stream};
use handover::{GatePolicy, Verdict, VmName};
use node_hooks_api::agent as wire;
use node_hooks_api::agent::from_agent::Message as Told;
use node_hooks_api::agent::to_agent::Message;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::board::{Board, Learned, Order, Standing};
use super::gate::{Decided, Desk, Reply, VmView};
use super::metrics::{AgentMetrics, End};
use super::opening::shortened;
use super::time::Nanos;

/// How often each side says at least something.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(1);
/// How many messages may wait for an agent. One that lags by more is of no use, and gets all that
/// counts again when it connects anew.
const QUEUE: usize = 512;
/// How many refusals of one stream's agent the log tells of; all of them are counted. Who refuses on and on should not
/// fill it.
const MOST_WARNINGS: u32 = 64;

/// What an agent is sent.
pub(super) type Outbound = Pin<Box<dyn Stream<Item = Result<wire::ToAgent, Status>> + Send>>;

/// What the hub needs of the rest of the controller.
pub(crate) trait Front: Send + Sync + 'static {
    /// There is news of this VM.
    fn wake(&self, vm: &VmName);

    /// How long a migration of the VM waits for its network, and what then.
    fn gate(&self, vm: &VmName) -> GatePolicy;
}

/// Where all that concerns the agents comes together.
pub(crate) struct Hub {
    inner: Mutex<Inner>,
    front: Arc<dyn Front>,
    metrics: AgentMetrics,
    /// There may be an earlier deadline at the gate.
    gate_news: Notify,
}

#[derive(Default)]
struct Inner {
    leading: bool,
    board: Board,
    desk: Desk,
    links: HashMap<String, Link>,
    next_link: u64,
}

/// The way to one agent.
struct Link {
    number: u64,
    queue: mpsc::Sender<wire::ToAgent>,
    end: oneshot::Sender<Status>,
    gone: CancellationToken,
    /// How many of its refusals the log told of.
    warnings: u32,
}

/// One agent's stream, as long as the hub has it.
#[derive(Clone)]
pub(super) struct Ticket {
    node: String,
    number: u64,
    gone: CancellationToken,
}

// === impl Hub ===

impl Hub {
    pub(crate) fn new(front: Arc<dyn Front>, metrics: AgentMetrics) -> Self {
        Self {
            inner: Mutex::default(),
            front,
            metrics,
            gate_news: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in how a VM's handover stands: `standing` is what is to be armed, `view` what the gate
    /// is answered by.
    pub(crate) fn stand(
        &self,
        vm: &VmName,
        standing: Option<Standing>,
        guest_on: Option<&str>,
        view: &VmView,
    ) {
        let mut inner = self.lock();
        let orders = inner.board.stand(vm, standing, guest_on);
        let woken = self.carry_out(&mut inner, orders);
        let replies = inner.desk.stand(vm, view, Instant::now());
        self.reply(&mut inner, replies);
        drop(inner);
        self.wake(woken);
    }

    /// What has been told of a migration of the VM.
    pub(crate) fn learned(&self, vm: &VmName, migration: &str) -> Learned {
        self.lock().board.learned(vm, migration)
    }

    /// What was answered at the gate about the VM and is to be recorded. Told once.
    pub(crate) fn decided(&self, vm: &VmName) -> Vec<Decided> {
        self.lock().desk.decided(vm)
    }

    /// This controller leads from now on, or no more. Who does not lead knows nothing and serves
    /// nobody.
    pub(crate) fn lead(&self, leading: bool) {
        let mut inner = self.lock();
        if leading && inner.leading {
            // The lock came back before anybody heard that it was gone.
            return;
        }
        let nodes: Vec<_> = inner.links.keys().cloned().collect();
        for node in nodes {
            let status = Status::unavailable("this controller leads no more");
            self.end(&mut inner, &node, End::NotLeading, status);
        }
        *inner = Inner {
            leading,
            next_link: inner.next_link,
            ..Inner::default()
        };
    }

    /// Answers, until `stop`, the questions that have waited long enough.
    pub(crate) async fn watch_gate(&self, stop: &CancellationToken) {
        loop {
            let deadline = self.lock().desk.next_deadline();
            let due = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.gate_news.notified() => {}
                () = due => {
                    let mut inner = self.lock();
                    let replies = inner.desk.expire(Instant::now());
                    let vms = self.reply(&mut inner, replies);
                    drop(inner);
                    self.wake(vms);
                }
            }
        }
    }

    /// Takes an agent in, in the place of an earlier one of the same node.
    ///
    /// # Errors
    ///
    /// UNAVAILABLE where this controller does not lead.
    pub(super) fn attach(&self, node: &str) -> Result<(Ticket, Outbound), Status> {
        let mut inner = self.lock();
        if !inner.leading {
            return Err(not_leading());
        }
        let newer = Status::aborted("a newer stream of this node has taken this one's place");
        self.end(&mut inner, node, End::Replaced, newer);
        let (queue, queued) = mpsc::channel(QUEUE);
        let (end, ended) = oneshot::channel();
        let ticket = Ticket {
            node: node.to_owned(),
            number: inner.next_link,
            gone: CancellationToken::new(),
        };
        inner.next_link += 1;
        let link = Link {
            number: ticket.number,
            queue,
            end,
            gone: ticket.gone.clone(),
            warnings: 0,
        };
        inner.links.insert(node.to_owned(), link);
        self.metrics.connected(inner.links.len());
        let welcome = Message::Welcome(wire::Welcome {
            revision: node_hooks_api::REVISION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            heartbeat_ms: u32::try_from(HEARTBEAT.as_millis()).unwrap_or(u32::MAX),
        });
        self.send(&mut inner, node, welcome);
        let orders = inner.board.greet(node);
        let woken = self.carry_out(&mut inner, orders);
        drop(inner);
        self.wake(woken);
        Ok((ticket, outbound(queued, ended)))
    }

    /// The stream is over, for this reason.
    pub(super) fn detach(&self, ticket: &Ticket, reason: End, status: Status) {
        let mut inner = self.lock();
        if inner.has(ticket) {
            self.end(&mut inner, &ticket.node, reason, status);
        }
    }

    /// Says something for the sake of saying it.
    pub(super) fn beat(&self, ticket: &Ticket, number: u64) {
        let mut inner = self.lock();
        if inner.has(ticket) {
            let beat = wire::Heartbeat {
                number,
                answer: false,
            };
            self.send(&mut inner, &ticket.node, Message::Heartbeat(beat));
        }
    }

    /// Takes in what an agent told at `now`. Returns whom to [`wake`](Self::wake) once what is to be said to agents is on
    /// its way: to wake another thread takes as long as a hop.
    #[must_use]
    pub(super) fn heard(&self, ticket: &Ticket, told: Told, now: Nanos) -> Vec<VmName> {
        let node = &ticket.node;
        // Asked of others before the lock is taken.
        let gate = match &told {
            Told::GateQuestion(question) => {
                let vm = VmName::new(&question.namespace, &question.vm);
                Some(self.front.gate(&vm))
            }
            _ => None,
        };
        let mut inner = self.lock();
        if !inner.has(ticket) {
            return Vec::new();
        }
        match told {
            Told::Signal(signal) => {
                let (taken, orders) = inner.board.saw(node, &signal, now);
                let woken = self.carry_out(&mut inner, orders);
                self.metrics.told(signal.kind(), signal.source(), taken);
                woken
            }
            Told::Outcome(outcome) => {
                self.note_refusal(&mut inner, node, &outcome);
                let order = inner.board.answered(node, &outcome);
                self.carry_out(&mut inner, order.into_iter().collect())
            }
            Told::Heartbeat(beat) => {
                if !beat.answer {
                    let answer = wire::Heartbeat {
                        answer: true,
                        ..beat
                    };
                    self.send(&mut inner, node, Message::Heartbeat(answer));
                }
                Vec::new()
            }
            Told::GateQuestion(question) => {
                self.asked(&mut inner, node, &question, gate.unwrap_or_default())
            }
            Told::GateWithdrawn(question) => {
                inner.desk.withdraw(node, question.question);
                Vec::new()
            }
            Told::Forgery(forgery) => {
                self.metrics.forged();
                tracing::debug!(node, ?forgery, "forged announcement");
                Vec::new()
            }
            Told::Port(report) => {
                tracing::trace!(node, ?report, "port");
                Vec::new()
            }
            Told::Hello(_) => {
                let status = Status::invalid_argument("Hello is said once");
                self.end(&mut inner, node, End::Abuse, status);
                Vec::new()
            }
        }
    }

    /// Tells of a command that an agent did not carry out. What came of an opening is in the record.
    fn note_refusal(&self, inner: &mut Inner, node: &str, outcome: &wire::Outcome) {
        let result = outcome.result();
        let is_done = result == wire::outcome::Result::Done;
        if is_done || inner.board.is_of_opening(node, outcome) {
            return;
        }
        self.metrics.command_refused(result);
        let Some(link) = inner.links.get_mut(node) else {
            return;
        };
        if link.warnings == MOST_WARNINGS {
            return;
        }
        link.warnings += 1;
        let id = outcome.id.clone().unwrap_or_default();
        let vm = shortened(&format!("{}/{}", id.namespace, id.vm));
        let reason = shortened(&outcome.reason);
        let result = result.as_str_name();
        tracing::warn!(node, vm, result, reason, "the agent refuses a command");
    }

    /// Takes a question at the gate. Looking at its VM answers it.
    fn asked(
        &self,
        inner: &mut Inner,
        node: &str,
        question: &wire::GateQuestion,
        policy: GatePolicy,
    ) -> Vec<VmName> {
        let asked = inner.desk.ask(node, question, policy, Instant::now());
        let Ok(vm) = asked else {
            let status = Status::resource_exhausted("too many questions are open");
            self.end(inner, node, End::Abuse, status);
            return Vec::new();
        };
        self.gate_news.notify_one();
        vec![vm]
    }

    /// Has these VMs looked at.
    pub(super) fn wake(&self, vms: Vec<VmName>) {
        for vm in vms {
            self.front.wake(&vm);
        }
    }

    /// Returns the VMs that are to be looked at.
    fn carry_out(&self, inner: &mut Inner, orders: Vec<Order>) -> Vec<VmName> {
        let mut woken = Vec::new();
        for order in orders {
            match order {
                Order::Tell { node, message } => {
                    let farewell = match &message {
                        Message::Disarm(disarm) => Some(disarm.clone()),
                        _ => None,
                    };
                    let sent = self.send(inner, &node, message);
                    if let Some(disarm) = farewell.filter(|_| !sent) {
                        inner.board.keep(&node, disarm);
                    }
                }
                Order::Open { vm, node, open } => {
                    if !self.send(inner, &node, Message::Open(open)) {
                        inner.board.unopened(&vm);
                    }
                }
                Order::Wake(vm) => woken.push(vm),
            }
        }
        woken
    }

    /// Sends what was decided at the gate. Returns the VMs whose records are to tell of it.
    fn reply(&self, inner: &mut Inner, replies: Vec<Reply>) -> Vec<VmName> {
        for reply in replies {
            let Reply {
                node,
                question,
                answer,
                waited,
            } = reply;
            self.metrics.answered(answer.verdict, waited);
            tracing::info!(node, verdict = ?answer.verdict, ?waited, reason = answer.reason, "gate");
            let answer = wire::GateAnswer {
                question,
                verdict: verdict(answer.verdict).into(),
                reason: answer.reason,
            };
            self.send(inner, &node, Message::GateAnswer(answer));
        }
        inner.desk.to_record()
    }

    /// Puts a message into an agent's queue. One that does not keep up is dropped, not waited for.
    fn send(&self, inner: &mut Inner, node: &str, message: Message) -> bool {
        use mpsc::error::TrySendError;
        let Some(link) = inner.links.get(node) else {
            return false;
        };
        let message = wire::ToAgent {
            message: Some(message),
        };
        let (reason, status) = match link.queue.try_send(message) {
            Ok(()) => return true,
            Err(TrySendError::Full(_)) => {
                let status = Status::resource_exhausted("the agent does not keep up");
                (End::Slow, status)
            }
            Err(TrySendError::Closed(_)) => (End::Closed, Status::cancelled("closed")),
        };
        self.end(inner, node, reason, status);
        false
    }

    fn end(&self, inner: &mut Inner, node: &str, reason: End, status: Status) {
        let Some(link) = inner.links.remove(node) else {
            return;
        };
        tracing::info!(node, ?reason, why = status.message(), "agent gone");
        self.metrics.ended(reason);
        self.metrics.connected(inner.links.len());
        inner.desk.leave(node);
        // Who closed the stream itself does not hear it any more.
        let _ = link.end.send(status);
        link.gone.cancel();
    }
}

/// The queue, until it ends with a status, which does not wait for what is queued.
fn outbound(queued: mpsc::Receiver<wire::ToAgent>, ended: oneshot::Receiver<Status>) -> Outbound {
    let ended = ended
        .map(|status| status.unwrap_or_else(|_| Status::unavailable("the controller stops")))
        .shared();
    let last = stream::once(ended.clone().map(Err));
    let queued = ReceiverStream::new(queued).map(Ok);
    Box::pin(queued.take_until(ended).chain(last))
}

pub(super) fn not_leading() -> Status {
    Status::unavailable("this controller does not lead; try another of its addresses")
}

fn verdict(verdict: Verdict) -> wire::gate_answer::Verdict {
    match verdict {
        Verdict::Go => wire::gate_answer::Verdict::Go,
        Verdict::GoUnprepared => wire::gate_answer::Verdict::GoUnprepared,
        Verdict::Fail => wire::gate_answer::Verdict::Fail,
    }
}

// === impl Inner ===

impl Inner {
    fn has(&self, ticket: &Ticket) -> bool {
        let link = self.links.get(&ticket.node);
        link.is_some_and(|link| link.number == ticket.number)
    }
}

// === impl Ticket ===

impl Ticket {
    /// Waits until the hub has given the stream up.
    pub(super) async fn gone(&self) {
        self.gone.cancelled().await;
    }
}
