//! What the state machine says, done.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arp_proxy::Mac;
use node_hooks_api::agent::{HandoverId, from_agent, outcome};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::core::{Again, Input, Output, Ticket, Written};
use crate::ear::{Ear, HeardFrame, LastFrame};
use crate::metrics::Metrics;
use crate::openflow::{self, Keeper, PacketOuts, Sent, Switch};
use crate::routes::{Removed, Routes};
use crate::time::Nanos;
use crate::wire::Outbox;
use crate::{announce, chain, hook};

/// How long an Open waits for a connection to the switch that is just not there, and then for the
/// socket to take what opens the ports. Longer, and the guest's own announcement is first.
const OPEN: Duration = Duration::from_secs(1);
/// How long the switch may take to say that it has processed it.
const PROCESSED: Duration = Duration::from_secs(2);

/// How long what is not urgent waits after a pause.
const ASIDE: Duration = Duration::from_millis(2);

/// How long the switch has, once it has removed what shut a port, to revise what it has cached of its tables: it does so when
/// it is idle. The frames, and what is told, wait so long: nobody is in a hurry for them.
const REVISE: Duration = Duration::from_millis(2);

/// What the probes see of the effects.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) armed: AtomicUsize,
    /// Announcements of guests that were left out.
    pub(super) missed: Arc<AtomicU64>,
    switch: Mutex<Option<watch::Receiver<openflow::State>>>,
}

/// Whatever the state machine acts on.
pub(super) struct Effects {
    outbox: Outbox,
    metrics: Arc<Metrics>,
    frames: mpsc::Sender<HeardFrame>,
    ears: HashMap<String, Ear>,
    /// Interfaces that could not be listened on, so that it is said once.
    deaf: HashSet<String>,
    bridge: PathBuf,
    keeper: Option<Keeper>,
    routes: Option<mpsc::UnboundedSender<RouteJob>>,
    gate: hook::Gate,
    done: mpsc::UnboundedSender<Input>,
    shared: Arc<Shared>,
    /// Where frames are listened to: a guest has many, and they are not to delay what a pause sets off.
    aside: Handle,
}

/// In order: a guest that leaves and comes back has its routes in the end.
enum RouteJob {
    Put {
        addresses: Vec<IpAddr>,
        interface: String,
    },
    Remove {
        addresses: Vec<IpAddr>,
    },
}

impl Shared {
    pub(super) fn is_switch_warm(&self) -> bool {
        let switch = self.switch.lock().unwrap_or_else(PoisonError::into_inner);
        switch
            .as_ref()
            .is_some_and(|state| matches!(&*state.borrow(), openflow::State::Warm(_)))
    }

    fn set_switch(&self, state: Option<watch::Receiver<openflow::State>>) {
        *self.switch.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

impl Effects {
    /// Effects, and where what came of them comes in. Frames are listened to on the runtime that this is called on.
    pub(super) fn new(
        outbox: Outbox,
        metrics: Arc<Metrics>,
        frames: mpsc::Sender<HeardFrame>,
        bridge: PathBuf,
        gate: hook::Gate,
        shared: Arc<Shared>,
    ) -> (Self, mpsc::UnboundedReceiver<Input>) {
        // As many may wait as openings and announcements are under way, which is bounded.
        let (done, receiver) = mpsc::unbounded_channel();
        let effects = Self {
            outbox,
            metrics,
            frames,
            ears: HashMap::new(),
            deaf: HashSet::new(),
            bridge,
            keeper: None,
            routes: None,
            gate,
            done,
            shared,
            aside: Handle::current(),
        };
        (effects, receiver)
    }

    /// With host routes, which a task of their own writes.
    pub(super) fn with_routes(mut self, routes: Routes, tasks: &mut JoinSet<()>) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        tasks.spawn(write_routes(routes, receiver, self.metrics.clone()));
        self.routes = Some(sender);
        self
    }

    pub(super) fn armed(&self, count: usize) {
        self.shared.armed.store(count, Ordering::Relaxed);
    }

    pub(super) fn carry_out(&mut self, output: Output) {
        match output {
            Output::Say(message) => {
                let reserved = reservation(&message);
                self.outbox.push(message);
                if let Some((vm, reason)) = reserved {
                    tracing::warn!(
                        vm,
                        reason,
                        "not all that a guest has is opened by this agent"
                    );
                }
            }
            Output::Open {
                ticket,
                frames,
                received,
                paused_at,
                again,
            } => self.open(
                frames,
                Opening {
                    ticket,
                    received,
                    paused_at,
                    again,
                    metrics: self.metrics.clone(),
                    done: self.done.clone(),
                },
            ),
            Output::Count(counted) => self.metrics.count(counted),
            Output::Listen {
                interface,
                mac,
                first_frame,
            } => self.listen(&interface, mac, first_frame),
            Output::Deafen { interface } => drop(self.ears.remove(&interface)),
            Output::AskLastFrame {
                vm,
                epoch,
                port,
                interface,
            } => self.ask(&interface, move |last| Input::LastFrame {
                vm,
                epoch,
                port,
                at: last.at,
                seen: Nanos::now(),
            }),
            Output::KeepSwitch(keep) => {
                self.keeper = keep.then(|| self.keeper());
                self.shared
                    .set_switch(self.keeper.as_ref().map(Keeper::state));
            }
            Output::ExpectToOpen(ports) => {
                // Without a keeper nothing is to be opened.
                if let Some(keeper) = &self.keeper {
                    keeper.expect_to_open(ports);
                }
            }
            Output::ExpectOpen(ports) => {
                if let Some(keeper) = &self.keeper {
                    keeper.expect_open(ports);
                }
            }
            Output::Announce {
                id,
                command,
                packets,
            } => self.announce(id, command, packets),
            Output::PutRoutes {
                addresses,
                interface,
            } => self.route(RouteJob::Put {
                addresses,
                interface,
            }),
            Output::RemoveRoutes { addresses } => self.route(RouteJob::Remove { addresses }),
            Output::Answer {
                calls,
                verdict,
                reason,
            } => self.gate.answer(calls, verdict, &reason),
        }
    }

    fn keeper(&self) -> Keeper {
        let done = self.done.clone();
        Keeper::start(self.bridge.clone(), move |ports| {
            let at = Nanos::now();
            let _ = done.send(Input::Blocked { ports, at });
        })
    }

    /// Finds out the last frame of a guest that has paused, when that has been told: whom it is told to may need this
    /// processor.
    fn ask(&self, interface: &str, answer: impl FnOnce(LastFrame) -> Input + Send + 'static) {
        let Some(last) = self.ears.get(interface).map(Ear::last) else {
            return;
        };
        let done = self.done.clone();
        self.aside.spawn(async move {
            sleep(ASIDE).await;
            if let Some(last) = last.frame() {
                let _ = done.send(answer(last));
            }
        });
    }

    /// Interfaces that were listened on and are heard no more.
    pub(super) fn deaf(&mut self) -> Vec<String> {
        let ended = self.ears.extract_if(|_, ear| ear.has_ended());
        ended.map(|(interface, _)| interface).collect()
    }

    fn listen(&mut self, interface: &str, mac: Mac, first_frame: bool) {
        let listening = match self.ears.remove(interface) {
            Some(ear) if !ear.has_ended() => Ok(ear),
            _ => {
                let _aside = self.aside.enter();
                let missed = self.shared.missed.clone();
                Ear::listen(interface, mac, self.frames.clone(), missed)
            }
        };
        let ear = match listening {
            Ok(ear) => ear,
            Err(error) => {
                self.metrics.not_done("listen");
                if self.deaf.insert(interface.to_owned()) {
                    let error = chain(&error);
                    tracing::warn!(
                        interface,
                        error,
                        "a guest's frames are not heard; trying again"
                    );
                }
                let interface = interface.to_owned();
                let _ = self.done.send(Input::Deaf { interface });
                return;
            }
        };
        self.deaf.remove(interface);
        if first_frame && let Err(error) = ear.expect_first() {
            tracing::warn!(interface, %error, "a guest's first frame will not be seen");
        }
        self.ears.insert(interface.to_owned(), ear);
    }

    /// What opens the ports is in the switch's socket when this returns, if there is a connection.
    ///
    /// Where it is known what shuts them that goes first, and the frames follow: the switch's one thread would take them
    /// through its tables and tell ovn-controller before it let anything pass.
    fn open(&self, frames: Arc<PacketOuts>, opening: Opening) {
        let switch = match &self.keeper {
            Some(keeper) => keeper.switch(),
            None => Err(openflow::Error::Cold(None)),
        };
        let blocks = self
            .keeper
            .as_ref()
            .and_then(|keeper| keeper.blocks_to_remove(&frames));
        let bridge = self.bridge.clone();
        // Sent before anything is waited for.
        let sent = switch.and_then(|switch| match blocks {
            Some(blocks) => Ok((switch.remove(&blocks)?, Some(switch))),
            None => Ok((switch.send(&frames)?, None)),
        });
        tokio::spawn(async move {
            match sent {
                Ok((removal, Some(switch))) => opening.ahead(removal, switch, bridge, frames).await,
                Ok((sent, None)) => opening.by_frames(sent).await,
                Err(error) => opening.anew(error, bridge, frames).await,
            }
        });
    }

    fn announce(&self, id: HandoverId, command: Option<u64>, packets: Arc<PacketOuts>) {
        let (bridge, done, metrics) =
            (self.bridge.clone(), self.done.clone(), self.metrics.clone());
        tokio::spawn(async move {
            let announcing = async {
                let sent = connect_and_send(bridge, packets).await?;
                sent.processed().await
            };
            let result = match timeout(PROCESSED, announcing).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(chain(&error)),
                Err(_) => Err(format!("the switch does not answer within {PROCESSED:?}")),
            };
            if let Err(why) = &result {
                metrics.not_done("announce");
                let vm = format!("{}/{}", id.namespace, id.vm);
                tracing::warn!(vm, why, "a guest's neighbours are not told where it is");
            }
            let _ = done.send(Input::Announced {
                id,
                command,
                result,
            });
        });
    }

    fn route(&self, job: RouteJob) {
        // The controller wants them wherever the node does.
        if let Some(routes) = &self.routes {
            let _ = routes.send(job);
        }
    }
}

/// The VM, and what of a command was not carried out, where the rest was.
fn reservation(message: &from_agent::Message) -> Option<(String, String)> {
    let from_agent::Message::Outcome(outcome) = message else {
        return None;
    };
    let is_partial = outcome.result() == outcome::Result::Done && !outcome.reason.is_empty();
    let id = outcome.id.as_ref().filter(|_| is_partial)?;
    Some((
        format!("{}/{}", id.namespace, id.vm),
        outcome.reason.clone(),
    ))
}

async fn connect_and_send(
    bridge: PathBuf,
    packets: Arc<PacketOuts>,
) -> Result<Sent, openflow::Error> {
    Switch::connect(&bridge).await?.send(&packets)
}

/// An opening that is under way.
struct Opening {
    ticket: Ticket,
    received: Nanos,
    paused_at: Nanos,
    again: Option<Again>,
    metrics: Arc<Metrics>,
    done: mpsc::UnboundedSender<Input>,
}

impl Opening {
    /// What shuts the ports is being removed; OVN is told afterwards.
    async fn ahead(self, removal: Sent, switch: Switch, bridge: PathBuf, frames: Arc<PacketOuts>) {
        let written = match self.written(removal).await {
            Ok(written) => written,
            // Removed or not: the frames open the ports in any case.
            Err(why) => {
                return self
                    .anew(openflow::Error::Cold(Some(Arc::new(why))), bridge, frames)
                    .await;
            }
        };
        sleep(REVISE).await;
        let shown = switch.send(&frames);
        let vm = self.ticket.vm().to_string();
        self.log(&written, "ports opened, ahead of OVN");
        self.tell(Ok(written));
        let showing = async {
            let sent = match shown {
                Ok(sent) => sent,
                Err(_) => connect_and_send(bridge, frames).await?,
            };
            sent.processed().await
        };
        let error = match timeout(PROCESSED, showing).await {
            Ok(Ok(_)) => return,
            Ok(Err(error)) => chain(&error),
            Err(_) => format!("the switch does not answer within {PROCESSED:?}"),
        };
        tracing::warn!(
            vm,
            error,
            "OVN does not know yet that the ports are open: the guest's announcement tells it"
        );
    }

    /// The frames are sent, which have OVN open the ports.
    async fn by_frames(self, sent: Sent) {
        match self.written(sent).await {
            Ok(written) => {
                self.log(&written, "ports opened");
                self.tell(Ok(written));
            }
            Err(error) => self.failed(&chain(&error)),
        }
    }

    /// There is no connection, or no more: the frames are sent on another.
    async fn anew(self, error: openflow::Error, bridge: PathBuf, frames: Arc<PacketOuts>) {
        tracing::debug!(
            error = chain(&error),
            "no connection to the switch at an Open"
        );
        match timeout(OPEN, connect_and_send(bridge, frames)).await {
            Ok(Ok(sent)) => self.by_frames(sent).await,
            Ok(Err(error)) => self.failed(&chain(&error)),
            Err(_) => self.failed(&chain(&error)),
        }
    }

    /// Waits until the switch has taken what was sent and, for a while, until it has processed it.
    async fn written(&self, mut sent: Sent) -> Result<Written, openflow::Error> {
        let at = match timeout(OPEN, sent.written()).await {
            Ok(written) => written?,
            Err(_) => return Err(openflow::Error::Stuck("its socket takes nothing")),
        };
        let processed = match timeout(PROCESSED, sent.processed()).await {
            Ok(processed) => Some(processed?),
            Err(_) => None,
        };
        // This thread may have been interrupted between the write and its stamp.
        let sent = processed.map_or(at, |processed| processed.min(at));
        let received = self.received;
        if self.again.is_none() {
            let after_pause = (self.paused_at.0 > 0).then(|| sent.since(self.paused_at));
            self.metrics.opened(sent.since(received), after_pause);
            if let Some(processed) = processed {
                self.metrics.processed(processed.since(received));
            }
        }
        Ok(Written {
            received,
            sent,
            processed,
        })
    }

    fn log(&self, written: &Written, what: &'static str) {
        let vm = self.ticket.vm().to_string();
        let written_us = u64::try_from(written.sent.since(self.received).as_micros());
        let written_us = written_us.unwrap_or(u64::MAX);
        match self.again {
            None => tracing::info!(vm, written_us, "{what}"),
            Some(Again::Undone) => tracing::warn!(
                vm,
                written_us,
                "{what}, again: OVN had blocked them since; has ovn-controller been started anew?"
            ),
            Some(Again::GuestRuns) => tracing::info!(
                vm,
                written_us,
                "{what}: OVN blocked them, and their guest runs here"
            ),
        }
    }

    fn failed(self, why: &str) {
        let vm = self.ticket.vm().to_string();
        tracing::warn!(
            vm,
            why,
            "ports not opened: OVN does it when the guest announces itself"
        );
        self.metrics.not_done("open");
        self.tell(Err(why.to_owned()));
    }

    fn tell(self, result: Result<Written, String>) {
        let Self { ticket, done, .. } = self;
        let _ = done.send(Input::Opened { ticket, result });
    }
}

async fn write_routes(
    routes: Routes,
    mut jobs: mpsc::UnboundedReceiver<RouteJob>,
    metrics: Arc<Metrics>,
) {
    // Before anything is put there: a proxy neighbour is never without its route then.
    match routes.sweep().await {
        Ok(Removed { proxies: 0, .. }) => {}
        Ok(Removed { proxies, .. }) => {
            tracing::info!(proxies, "removed proxy neighbours of guests that have left");
        }
        Err(error) => {
            metrics.not_done("routes");
            let error = chain(&error);
            tracing::warn!(
                error,
                "this node may answer for guests that left it before this start"
            );
        }
    }
    while let Some(job) = jobs.recv().await {
        let failed = match &job {
            RouteJob::Put {
                addresses,
                interface,
            } => {
                let put = routes.put(addresses, interface).await;
                let told = tell_uplinks(&routes, addresses, interface).await;
                put.err().map(|error| chain(&error)).or(told.err())
            }
            RouteJob::Remove { addresses } => {
                let removed = routes.remove(addresses).await;
                removed.err().map(|error| chain(&error))
            }
        };
        if let Some(error) = failed {
            metrics.not_done("routes");
            tracing::warn!(error, "a guest's host routes are not as they should be");
        }
    }
}

/// Tells a guest's neighbours on the uplinks that it is behind this host now.
async fn tell_uplinks(
    routes: &Routes,
    addresses: &[IpAddr],
    interface: &str,
) -> Result<(), String> {
    let uplinks = routes.uplinks(addresses, interface).await;
    let uplinks = uplinks.map_err(|error| chain(&error))?;
    for (uplink, addresses) in uplinks {
        announce::on_uplink(&uplink, &addresses).map_err(|error| chain(&error))?;
    }
    Ok(())
}
