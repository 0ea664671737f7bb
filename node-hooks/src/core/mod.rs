//! What the agent does, as a state machine without I/O and without a clock: what comes in is an
//! [`Input`], what is to be done comes out as [`Output`]s.
//!
//! # Guarantees
//! - A port is opened only for a handover that is armed here as the target: on the controller's word, by its epoch and
//!   migration; or where OVN blocks it although it was opened so a moment ago, or although its guest runs here, as frames
//!   of the guest's show that came in by that port, or the controller says. Nothing that happens on the source opens it,
//!   and no event of a hypervisor does alone.
//! - A command of an older handover than the newest that was armed or disarmed for its VM is refused.
//! - After a Disarm nothing of the handover is left but its number.
//! - What is kept is bounded, whatever is sent: by guests, by the controller, by KubeVirt.

mod armed;
mod commands;
mod forgery;
mod gate;
mod observe;
mod reopen;
mod seen;
#[cfg(test)]
mod tests;
mod vm;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arp_proxy::Mac;
use node_hooks_api::agent::gate_answer::Verdict;
use node_hooks_api::agent::signal::{Kind, Source};
use node_hooks_api::agent::{HandoverId, from_agent, outcome, to_agent};

use crate::ear::HeardFrame;
use crate::openflow::PacketOuts;
use crate::ovs::Interfaces;
use crate::signals::LifecycleEvent;
use crate::time::Nanos;
use armed::{Armed, Side};
pub use forgery::Forged;
use forgery::Told;
use gate::Gate;
pub use gate::{Call, Instance};
pub use vm::Vm;

/// For how long what is armed is observed without a word from a controller: longer than any
/// controller is away, and than most migrations take.
pub const EXPIRY: Duration = Duration::from_mins(15);
/// The most handovers armed at a time. KubeVirt migrates two VMs of a node at a time unless told
/// otherwise.
const MOST_ARMED: usize = 512;
/// The most VMs whose newest handover is remembered.
const MOST_KNOWN: usize = 4096;

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A hypervisor on this node said something of a domain.
    Lifecycle(LifecycleEvent),
    /// A frame was heard on an interface.
    Heard(HeardFrame),
    /// The answer to [`Output::AskLastFrame`].
    LastFrame {
        /// The VM.
        vm: Vm,
        /// Of the handover that asked.
        epoch: u64,
        /// The port.
        port: String,
        /// The kernel's stamp of the frame.
        at: Nanos,
        /// When it was learned.
        seen: Nanos,
    },
    /// An interface cannot be listened on, or no longer. It is tried again.
    Deaf {
        /// The interface.
        interface: String,
    },
    /// The switch's interfaces are these now.
    Interfaces(Arc<Interfaces>),
    /// There is a stream to the controller that leads, and it has welcomed this agent.
    Linked,
    /// That stream is lost.
    Unlinked,
    /// The controller said something.
    Command {
        /// What it said.
        message: to_agent::Message,
        /// When it arrived.
        received: Nanos,
    },
    /// What came of [`Output::Open`].
    Opened {
        /// Which one.
        ticket: Ticket,
        /// The stamps, or why nothing was opened.
        result: Result<Written, String>,
    },
    /// OVN blocks ports that [`Output::ExpectOpen`] named last; to be said as often as it is found.
    Blocked {
        /// Their numbers.
        ports: BTreeSet<u16>,
        /// When it was found.
        at: Nanos,
    },
    /// What came of [`Output::Announce`].
    Announced {
        /// Which handover.
        id: HandoverId,
        /// The command's number; None where nobody commanded it.
        command: Option<u64>,
        /// Nothing, or what failed.
        result: Result<(), String>,
    },
    /// The node hook was called.
    Asked {
        /// The call.
        call: Call,
        /// What it is about.
        about: Instance,
    },
    /// The node hook's caller waits no more.
    Withdrawn {
        /// The call.
        call: Call,
    },
    /// Time has passed; expected every second or so.
    Tick,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Tell the controller.
    Say(from_agent::Message),
    /// Listen for frames of `mac` on an interface, if it is not listened on yet.
    Listen {
        /// The interface.
        interface: String,
        /// The guest's MAC.
        mac: Mac,
        /// Tell of the next plain frame.
        first_frame: bool,
    },
    /// Listen no more.
    Deafen {
        /// The interface.
        interface: String,
    },
    /// Find out when the guest's last frame came in on an interface that is listened on: it has
    /// paused.
    AskLastFrame {
        /// The VM.
        vm: Vm,
        /// Of the handover that asks.
        epoch: u64,
        /// The port.
        port: String,
        /// Its interface.
        interface: String,
    },
    /// Keep a connection to the switch ready, or keep none.
    KeepSwitch(bool),
    /// Find out what shuts these ports of the switch, and keep finding out.
    ExpectToOpen(BTreeSet<u16>),
    /// Of these ports some are to be open by now: look often whether they are.
    ExpectOpen(BTreeSet<u16>),
    /// Open ports: remove what shuts them, and have OVN activate them by these frames, as if they had come in on the ports.
    Open {
        /// To be returned in [`Input::Opened`].
        ticket: Ticket,
        /// A frame for each of the VM's ports.
        frames: Arc<PacketOuts>,
        /// When the command arrived, or the ports were found blocked.
        received: Nanos,
        /// When the source saw the pause, on its own clock; 0 where it is not known.
        paused_at: Nanos,
        /// Why it is done without a command.
        again: Option<Again>,
    },
    /// Tell the neighbours where the guest is.
    Announce {
        /// To be returned in [`Input::Announced`].
        id: HandoverId,
        /// Likewise.
        command: Option<u64>,
        /// Frames as QEMU or the guest itself would announce it.
        packets: Arc<PacketOuts>,
    },
    /// Make host routes and proxy neighbours for the addresses.
    PutRoutes {
        /// The guest's.
        addresses: Vec<IpAddr>,
        /// Where they are.
        interface: String,
    },
    /// Take those away again.
    RemoveRoutes {
        /// The guest's.
        addresses: Vec<IpAddr>,
    },
    /// Answer calls of the node hook.
    Answer {
        /// The calls.
        calls: BTreeSet<Call>,
        /// Never unspecified.
        verdict: Verdict,
        /// Why, for people.
        reason: String,
    },
    /// Count this.
    Count(Counted),
}

/// Which opening of which VM's ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    vm: Vm,
    serial: u64,
}

impl Ticket {
    /// Whose ports.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }
}

/// Why the agent opens ports by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Again {
    /// They had been opened on command, and were blocked again.
    Undone,
    /// Their guest runs here.
    GuestRuns,
}

impl Again {
    /// Every reason there is.
    pub const ALL: [Self; 2] = [Self::Undone, Self::GuestRuns];

    /// The reason, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Undone => "undone",
            Self::GuestRuns => "guest_runs",
        }
    }
}

/// When what opens ports was written into the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The command arrived.
    pub received: Nanos,
    /// All of it had been written to the switch's socket.
    pub sent: Nanos,
    /// The switch had processed it; None where it did not say so in time.
    pub processed: Option<Nanos>,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// Something was observed of a VM that is armed.
    Signal(Kind, Source),
    /// An announcement opened nothing.
    Forgery(Forged),
    /// A command was carried out or refused.
    Command(&'static str, outcome::Result),
    /// Ports were opened without a command.
    Reopened(Again),
    /// A handover was observed no more because no controller spoke of it.
    Expired,
}

/// The agent's state.
#[derive(Debug, Default)]
pub struct Core {
    interfaces: Arc<Interfaces>,
    vms: BTreeMap<Vm, Known>,
    domains: HashMap<String, Vm>,
    ears: BTreeMap<String, Ear>,
    gate: Gate,
    told: Told,
    linked: bool,
    keeps_switch: bool,
    /// What was said last in [`Output::ExpectToOpen`].
    expected: BTreeSet<u16>,
    /// What was said last in [`Output::ExpectOpen`].
    expected_open: BTreeSet<u16>,
    last_serial: u64,
}

/// What is known of a VM: its newest handover, and whether that is armed.
#[derive(Debug)]
struct Known {
    epoch: u64,
    migration_uid: String,
    touched: Instant,
    armed: Option<Armed>,
}

/// Whose frames are heard on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ear {
    vm: Vm,
    epoch: u64,
    port: String,
    mac: Mac,
    target: bool,
}

impl Core {
    /// Takes what happened, and appends what is to be done, in order.
    pub fn handle(&mut self, input: Input, now: Instant, out: &mut Vec<Output>) {
        match input {
            Input::Lifecycle(event) => self.lifecycle(&event, now, out),
            Input::Heard(frame) => self.heard(&frame, now, out),
            Input::LastFrame {
                vm,
                epoch,
                port,
                at,
                seen,
            } => self.last_frame(&vm, epoch, port, (at, seen), out),
            Input::Deaf { interface } => drop(self.ears.remove(&interface)),
            Input::Interfaces(interfaces) => self.interfaces_are(interfaces, now, out),
            Input::Linked => self.linked(out),
            Input::Unlinked => self.unlinked(now),
            Input::Command { message, received } => self.command(message, received, now, out),
            Input::Opened { ticket, result } => self.opened(&ticket, result, now, out),
            Input::Blocked { ports, at } => self.blocked(&ports, at, now, out),
            Input::Announced {
                id,
                command,
                result,
            } => {
                let (result, reason) = match result {
                    Ok(()) => (outcome::Result::Done, String::new()),
                    Err(reason) => (outcome::Result::Failed, reason),
                };
                if let Some(command) = command {
                    self.say_outcome("announce", id, command, (result, reason), out);
                }
            }
            Input::Asked { call, about } => {
                let asked = self.gate.ask(call, about);
                self.say(asked.map(from_agent::Message::GateQuestion), out);
            }
            Input::Withdrawn { call } => {
                let withdrawn = self.gate.withdraw(call);
                self.say(withdrawn.map(from_agent::Message::GateWithdrawn), out);
            }
            Input::Tick => self.tick(now, out),
        }
    }

    /// Whether anything is armed.
    pub fn is_busy(&self) -> bool {
        self.armed().next().is_some()
    }

    /// How many handovers are armed.
    pub fn armed_count(&self) -> usize {
        self.armed().count()
    }

    fn command(
        &mut self,
        message: to_agent::Message,
        received: Nanos,
        now: Instant,
        out: &mut Vec<Output>,
    ) {
        match message {
            to_agent::Message::Open(open) => self.open(open, received, now, out),
            to_agent::Message::Arm(arm) => self.arm(arm, now, out),
            to_agent::Message::Disarm(disarm) => self.disarm(disarm, now, out),
            to_agent::Message::Announce(announce) => self.announce(announce, out),
            to_agent::Message::GateAnswer(answer) => {
                let calls = self.gate.answered(&answer);
                if !calls.is_empty() {
                    out.push(Output::Answer {
                        calls,
                        verdict: answer.verdict(),
                        reason: answer.reason,
                    });
                }
            }
            // Between the two ends of the stream.
            to_agent::Message::Welcome(_) | to_agent::Message::Heartbeat(_) => {}
        }
    }

    fn linked(&mut self, out: &mut Vec<Output>) {
        self.linked = true;
        let questions = self.gate.open().map(from_agent::Message::GateQuestion);
        out.extend(questions.map(Output::Say));
    }

    /// What is seen from now on is kept, and told when the next controller arms the handover.
    fn unlinked(&mut self, now: Instant) {
        self.linked = false;
        for armed in self
            .vms
            .values_mut()
            .filter_map(|known| known.armed.as_mut())
        {
            if std::mem::take(&mut armed.on_this_stream) {
                armed.contact = now;
            }
        }
    }

    fn tick(&mut self, now: Instant, out: &mut Vec<Output>) {
        let is_old = |since: Instant| now.saturating_duration_since(since) >= EXPIRY;
        let linked = self.linked;
        let forgotten = |armed: &Armed| !(linked && armed.on_this_stream) && is_old(armed.contact);
        let expired: Vec<Vm> = self
            .armed()
            .filter(|(_, armed)| forgotten(armed))
            .map(|(vm, _)| vm.clone())
            .collect();
        for vm in expired {
            // Where its guest runs is not known: what routes it has are left as they are.
            self.release(&vm, now, out);
            out.push(Output::Count(Counted::Expired));
        }
        self.vms
            .retain(|_, known| known.armed.is_some() || !is_old(known.touched));
        self.told.forget(now);
        self.attend(now, out);
    }

    fn armed(&self) -> impl Iterator<Item = (&Vm, &Armed)> {
        self.vms
            .iter()
            .filter_map(|(vm, known)| Some((vm, known.armed.as_ref()?)))
    }

    /// Forgets what is armed for `vm`, but not its number.
    fn release(&mut self, vm: &Vm, now: Instant, out: &mut Vec<Output>) -> Option<Armed> {
        let armed = self.vms.get_mut(vm)?.armed.take()?;
        self.domains.remove(&armed.domain);
        self.attend(now, out);
        Some(armed)
    }

    /// Listens on the interfaces of the ports that are armed and on no others, and keeps a connection
    /// to the switch for as long as it may be needed.
    fn attend(&mut self, now: Instant, out: &mut Vec<Output>) {
        let mut wanted = BTreeMap::new();
        for (vm, armed) in self.armed() {
            for (port, mac) in armed.ports_with_mac() {
                let port = &port.port;
                let Some(interface) = self.interfaces.get(&port.name) else {
                    continue;
                };
                let ear = Ear {
                    vm: vm.clone(),
                    epoch: armed.id.epoch,
                    port: port.name.clone(),
                    mac,
                    target: armed.side == Side::Target,
                };
                wanted.insert(interface.name.clone(), ear);
            }
        }
        for (interface, ear) in &self.ears {
            if wanted.get(interface).is_none_or(|now| now.mac != ear.mac) {
                let interface = interface.clone();
                out.push(Output::Deafen { interface });
            }
        }
        for (interface, ear) in &wanted {
            if self.ears.get(interface) != Some(ear) {
                out.push(Output::Listen {
                    interface: interface.clone(),
                    mac: ear.mac,
                    first_frame: ear.target,
                });
            }
        }
        self.ears = wanted;
        let keep = self.armed().any(|(_, armed)| armed.side == Side::Target);
        if keep != self.keeps_switch {
            self.keeps_switch = keep;
            out.push(Output::KeepSwitch(keep));
        }
        let expected = self.expected_to_open();
        if expected != self.expected {
            self.expected.clone_from(&expected);
            out.push(Output::ExpectToOpen(expected));
        }
        let expected = self.expected_open(now);
        if expected != self.expected_open {
            self.expected_open.clone_from(&expected);
            out.push(Output::ExpectOpen(expected));
        }
    }

    /// The numbers of the ports that guests are to come to.
    fn expected_to_open(&self) -> BTreeSet<u16> {
        let targets = self.armed().filter(|(_, armed)| armed.side == Side::Target);
        let stations = targets.flat_map(|(_, armed)| armed.stations(&self.interfaces));
        stations.map(|(number, _)| number).collect()
    }

    fn say(&self, message: impl IntoIterator<Item = from_agent::Message>, out: &mut Vec<Output>) {
        if self.linked {
            out.extend(message.into_iter().map(Output::Say));
        }
    }
}
