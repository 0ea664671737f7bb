//! What the controller commands: arm, disarm, open, announce.

use std::sync::Arc;
use std::time::{Duration, Instant};

use node_hooks_api::agent::outcome::Result as Came;
use node_hooks_api::agent::{
    Announce, Arm, Disarm, HandoverId, Hops, Open, Outcome, PortReport, from_agent,
};

use super::armed::{Armed, ArmedPort, Opening, Plan, Side, hops};
use super::vm::{Standing, Vm};
use super::{Core, Counted, Known, MOST_ARMED, MOST_KNOWN, Output, Ticket, Written};
use crate::announce::through_switch;
use crate::openflow::PacketOuts;
use crate::ovs::Interfaces;
use crate::time::Nanos;

/// How long after the pause an Open is good: longer than a guest stands still, and than clocks may be apart. This process
/// may have been frozen, and the guest have come, gone, and be about to come again.
pub(super) const GOOD_FOR: Duration = Duration::from_secs(15);
/// The most commands that wait for one opening.
const MOST_WAITING: usize = 64;

impl Core {
    pub(super) fn arm(&mut self, arm: Arm, now: Instant, out: &mut Vec<Output>) {
        let id = arm.id.clone().unwrap_or_default();
        let checked = Plan::try_from(arm)
            .map_err(|reason| (Came::Failed, reason))
            .and_then(|plan| match self.standing(&plan.vm, &plan.id) {
                Standing::Stale(reason) => Err((Came::Stale, reason)),
                Standing::Newer | Standing::Same => self.admit(plan),
            });
        let plan = match checked {
            Ok(plan) => plan,
            Err(refused) => return self.say_outcome("arm", id, 0, refused, out),
        };
        let vm = plan.vm.clone();
        self.remember(&vm, &id, now);
        self.take(plan, now, out);
        self.tell_all(&vm, now, out);
        let known = self.vms.get(&vm).and_then(|known| known.armed.as_ref());
        match known.and_then(Armed::left_out) {
            Some(left_out) => self.say_outcome("arm", id, 0, (Came::Done, left_out), out),
            None => out.push(Output::Count(Counted::Command("arm", Came::Done))),
        }
    }

    /// Refuses a plan that takes what another VM's handover has, or one too many.
    fn admit(&self, plan: Plan) -> Result<Plan, (Came, String)> {
        let mut others = self.armed().filter(|(vm, _)| **vm != plan.vm);
        let taken = |armed: &Armed| {
            let has = |name: &str| armed.ports.iter().any(|other| other.port.name == name);
            armed.domain == plan.domain || plan.ports.iter().any(|port| has(&port.name))
        };
        if let Some((vm, _)) = others.find(|(_, armed)| taken(armed)) {
            let reason = format!("a port or the domain is armed for {vm}");
            return Err((Came::Failed, reason));
        }
        if self.armed().filter(|(vm, _)| **vm != plan.vm).count() >= MOST_ARMED {
            let reason = format!("{MOST_ARMED} handovers are armed on this node: too many");
            return Err((Came::Failed, reason));
        }
        Ok(plan)
    }

    /// Notes `id` as the newest handover of `vm`.
    fn remember(&mut self, vm: &Vm, id: &HandoverId, now: Instant) {
        if !self.vms.contains_key(vm) && self.vms.len() >= MOST_KNOWN {
            let idle = self.vms.iter().filter(|(_, known)| known.armed.is_none());
            let oldest = idle.min_by_key(|(_, known)| known.touched);
            if let Some(oldest) = oldest.map(|(vm, _)| vm.clone()) {
                self.vms.remove(&oldest);
            }
        }
        let known = self.vms.entry(vm.clone()).or_insert_with(|| Known {
            epoch: id.epoch,
            migration_uid: String::new(),
            touched: now,
            armed: None,
        });
        known.epoch = id.epoch;
        known.migration_uid.clone_from(&id.migration_uid);
        known.touched = now;
    }

    /// Puts the plan in place of what was armed for its VM.
    fn take(&mut self, plan: Plan, now: Instant, out: &mut Vec<Output>) {
        let vm = plan.vm.clone();
        let domain = plan.domain.clone();
        let Some(known) = self.vms.get_mut(&vm) else {
            return;
        };
        let mut unanswered = Vec::new();
        let mut armed = match known.armed.take() {
            Some(mut armed) if armed.id == plan.id && armed.side == plan.side => {
                self.domains.remove(&armed.domain);
                let (gone, commands) = armed.update(plan);
                unanswered = commands;
                take_routes_away(gone.iter().filter(|armed| armed.routed.is_some()), out);
                armed
            }
            Some(old) => {
                self.domains.remove(&old.domain);
                if plan.side == Side::Target {
                    // The guest left this node without a word, and comes back.
                    let routed = old.ports.iter().filter(|armed| armed.routed.is_some());
                    take_routes_away(routed, out);
                }
                Armed::new(plan, now)
            }
            None => Armed::new(plan, now),
        };
        if armed.has_lost_its_guest() {
            // An agent that ran here before this one made them.
            take_routes_away(armed.ports.iter(), out);
        }
        armed.prebuild(&self.interfaces);
        armed.settle_routes(&self.interfaces, out);
        let id = armed.id.clone();
        known.armed = Some(armed);
        self.domains.insert(domain, vm);
        self.attend(now, out);
        self.say_not_opened(&id, unanswered, "the ports are others by now", out);
    }

    /// Tells the controller how the ports stand and, once on a stream, what was seen before.
    fn tell_all(&mut self, vm: &Vm, now: Instant, out: &mut Vec<Output>) {
        let Some(armed) = self.vms.get_mut(vm).and_then(|known| known.armed.as_mut()) else {
            return;
        };
        armed.contact = now;
        let is_new = !std::mem::replace(&mut armed.on_this_stream, self.linked);
        if !self.linked {
            return;
        }
        let reports = armed.reports(&self.interfaces, true);
        out.extend(reports.into_iter().map(say_report));
        if !is_new {
            return;
        }
        let signals = armed.seen.history().cloned();
        out.extend(signals.map(|signal| Output::Say(from_agent::Message::Signal(signal))));
        if let Opening::Done { command, hops } = &armed.opening {
            out.push(armed.say_opened(*command, *hops));
        }
    }

    pub(super) fn disarm(&mut self, disarm: Disarm, now: Instant, out: &mut Vec<Output>) {
        let id = disarm.id.unwrap_or_default();
        let Some(vm) = Vm::of(&id) else {
            let refused = (Came::Failed, "the command names no handover".to_owned());
            return self.say_outcome("disarm", id, 0, refused, out);
        };
        if let Standing::Stale(reason) = self.standing(&vm, &id) {
            return self.say_outcome("disarm", id, 0, (Came::Stale, reason), out);
        }
        out.push(Output::Count(Counted::Command("disarm", Came::Done)));
        self.remember(&vm, &id, now);
        let Some(mut armed) = self.release(&vm, now, out) else {
            return;
        };
        armed.here = disarm.stays;
        if armed.routes && !disarm.stays {
            // Also those that an agent made which ran here before this one.
            take_routes_away(armed.ports.iter(), out);
        } else {
            armed.settle_routes(&self.interfaces, out);
        }
    }

    pub(super) fn open(
        &mut self,
        open: Open,
        received: Nanos,
        now: Instant,
        out: &mut Vec<Output>,
    ) {
        let id = open.id.unwrap_or_default();
        let paused_at = Nanos(open.paused_at_ns);
        // The source's clock may be no good; the controller always knows when it heard.
        let told_at = match paused_at {
            Nanos(0) => Nanos(open.heard_at_ns),
            paused_at => paused_at,
        };
        let serial = self.last_serial + 1;
        let interfaces = self.interfaces.clone();
        let opened = self.armed_by(&id).and_then(|(vm, armed)| {
            if armed.side != Side::Target {
                let reason = "armed here as the source: nothing to open".to_owned();
                return Err((Came::Unknown, reason));
            }
            match &mut armed.opening {
                Opening::UnderWay { commands, .. } if commands.len() < MOST_WAITING => {
                    commands.push(open.command);
                    Ok(None)
                }
                Opening::UnderWay { .. } => {
                    Err((Came::Failed, "too many commands to open at once".to_owned()))
                }
                Opening::Done { command, hops } => {
                    *command = open.command;
                    let hops = *hops;
                    Ok(Some(armed.say_opened(open.command, hops)))
                }
                Opening::Not if is_late(told_at, received) => {
                    let ago = received.since(told_at);
                    let reason = format!(
                        "the pause was {ago:?} ago by this node's clock, and the port may be shut for another migration \
                         by now: the agent was frozen, or the nodes' clocks differ"
                    );
                    Err((Came::Stale, reason))
                }
                Opening::Not => {
                    let Some(frames) = armed.prebuilt.clone() else {
                        return Err((Came::Failed, armed.why_not(&interfaces)));
                    };
                    armed.opening = Opening::UnderWay {
                        serial,
                        commands: vec![open.command],
                        frames: frames.clone(),
                    };
                    armed.reopening.commanded = Some(now);
                    Ok(Some(Output::Open {
                        ticket: Ticket { vm, serial },
                        frames,
                        received,
                        paused_at,
                        again: None,
                    }))
                }
            }
        });
        match opened {
            Err(refused) => self.say_outcome("open", id, open.command, refused, out),
            Ok(None) => {}
            Ok(Some(Output::Say(message))) => {
                out.push(Output::Count(Counted::Command("open", Came::Done)));
                self.say(Some(message), out);
            }
            Ok(Some(output)) => {
                self.last_serial = serial;
                out.push(output);
                self.opening(&id, now, out);
            }
        }
    }

    /// The guest has paused on the source: what comes from the ports from now on is its own.
    fn opening(&mut self, id: &HandoverId, now: Instant, out: &mut Vec<Output>) {
        let interfaces = self.interfaces.clone();
        if let Ok((_, armed)) = self.armed_by(id) {
            armed.listen_again(&interfaces, out);
        }
        self.attend(now, out);
    }

    pub(super) fn opened(
        &mut self,
        ticket: &Ticket,
        result: Result<Written, String>,
        now: Instant,
        out: &mut Vec<Output>,
    ) {
        if self.reopened(ticket, &result, now, out) {
            return;
        }
        let known = self.vms.get_mut(&ticket.vm);
        let Some(armed) = known.and_then(|known| known.armed.as_mut()) else {
            return;
        };
        let (waiting, frames) = match &mut armed.opening {
            Opening::UnderWay {
                serial,
                commands,
                frames,
            } if *serial == ticket.serial => (std::mem::take(commands), frames.clone()),
            _ => return,
        };
        let id = armed.id.clone();
        // The interface may have been made anew meanwhile: then what was opened is not what is there.
        let prebuilt = armed.prebuilt.as_ref();
        let still = prebuilt.is_some_and(|prebuilt| Arc::ptr_eq(prebuilt, &frames));
        let result = match result {
            Ok(_) if !still => Err("the port has another interface by now, or none".to_owned()),
            result => result,
        };
        let hops = match result {
            Ok(written) => hops(written.received, written.sent, written.processed),
            Err(reason) => {
                armed.opening = Opening::Not;
                if !still {
                    armed.reopening.commanded = None;
                }
                return self.say_not_opened(&id, waiting, &reason, out);
            }
        };
        let command = waiting.last().copied().unwrap_or_default();
        armed.opening = Opening::Done { command, hops };
        for command in waiting {
            out.push(Output::Count(Counted::Command("open", Came::Done)));
            if self.linked {
                out.push(armed.say_opened(command, hops));
            }
        }
    }

    /// Answers commands to open that opened nothing.
    fn say_not_opened(
        &self,
        id: &HandoverId,
        commands: Vec<u64>,
        reason: &str,
        out: &mut Vec<Output>,
    ) {
        for command in commands {
            let refused = (Came::Failed, reason.to_owned());
            self.say_outcome("open", id.clone(), command, refused, out);
        }
    }

    pub(super) fn announce(&mut self, announce: Announce, out: &mut Vec<Output>) {
        let id = announce.id.unwrap_or_default();
        let command = announce.command;
        let interfaces = self.interfaces.clone();
        let packets = self
            .armed_by(&id)
            .and_then(|(_, armed)| armed.announcements(&interfaces));
        match packets {
            Ok(packets) => out.push(Output::Announce {
                id,
                command: Some(command),
                packets: Arc::new(packets),
            }),
            Err(refused) => self.say_outcome("announce", id, command, refused, out),
        }
    }

    /// What is armed by exactly this handover.
    fn armed_by(&mut self, id: &HandoverId) -> Result<(Vm, &mut Armed), (Came, String)> {
        let vm = Vm::of(id).ok_or((Came::Failed, "the command names no handover".to_owned()))?;
        match self.standing(&vm, id) {
            Standing::Stale(reason) => return Err((Came::Stale, reason)),
            Standing::Newer | Standing::Same => {}
        }
        let known = self.vms.get_mut(&vm);
        known
            .and_then(|known| known.armed.as_mut())
            .filter(|armed| armed.id == *id)
            .map(|armed| (vm, armed))
            .ok_or((Came::Unknown, "not armed here".to_owned()))
    }

    fn standing(&self, vm: &Vm, id: &HandoverId) -> Standing {
        match self.vms.get(vm) {
            Some(known) if known.epoch > id.epoch => Standing::Stale(format!(
                "{vm}: epoch {} is over, {} (migration {}) is the newest",
                id.epoch, known.epoch, known.migration_uid
            )),
            Some(known) if known.epoch == id.epoch && known.migration_uid != id.migration_uid => {
                Standing::Stale(format!(
                    "{vm}: epoch {} is of migration {}",
                    id.epoch, known.migration_uid
                ))
            }
            Some(known) if known.epoch == id.epoch => Standing::Same,
            Some(_) | None => Standing::Newer,
        }
    }

    pub(super) fn say_outcome(
        &self,
        what: &'static str,
        id: HandoverId,
        command: u64,
        (result, reason): (Came, String),
        out: &mut Vec<Output>,
    ) {
        out.push(Output::Count(Counted::Command(what, result)));
        let outcome = Outcome {
            id: Some(id),
            command,
            result: result.into(),
            reason,
            hops: None,
        };
        self.say(Some(from_agent::Message::Outcome(outcome)), out);
    }
}

impl Armed {
    /// The answer to an order to open; what was left out is part of it.
    fn say_opened(&self, command: u64, hops: Hops) -> Output {
        Output::Say(from_agent::Message::Outcome(Outcome {
            id: Some(self.id.clone()),
            command,
            result: Came::Done.into(),
            reason: self.left_out().unwrap_or_default(),
            hops: Some(hops),
        }))
    }

    /// Why nothing can be opened.
    fn why_not(&self, interfaces: &Interfaces) -> String {
        match self.missing(interfaces) {
            none if none.is_empty() => self
                .left_out()
                .unwrap_or_else(|| "the switch has no usable number for a port".to_owned()),
            missing => format!("the switch has no interface for {missing}"),
        }
    }

    /// What QEMU would announce of the guest, and what itself would, on those of its ports that the switch has.
    fn announcements(&self, interfaces: &Interfaces) -> Result<PacketOuts, (Came, String)> {
        let mut packets = PacketOuts::opening(self.stations(interfaces))
            .map_err(|error| (Came::Failed, crate::chain(&error)))?;
        for (armed, mac) in self.ports_with_mac() {
            let Some(number) = armed.number(interfaces) else {
                continue;
            };
            through_switch(&mut packets, number.into(), mac, &armed.port.addresses)
                .map_err(|error| (Came::Failed, crate::chain(&error)))?;
        }
        if packets.is_empty() {
            let reason = "nothing to announce: no interface here, or no MAC".to_owned();
            return Err((Came::Failed, reason));
        }
        Ok(packets)
    }
}

/// What nobody stamped is never late.
fn is_late(told_at: Nanos, received: Nanos) -> bool {
    told_at != Nanos::default() && received.since(told_at) > GOOD_FOR
}

pub(super) fn say_report(report: PortReport) -> Output {
    Output::Say(from_agent::Message::Port(report))
}

/// Takes away what routes these ports have, or may have.
fn take_routes_away<'a>(ports: impl Iterator<Item = &'a ArmedPort>, out: &mut Vec<Output>) {
    for armed in ports.filter(|armed| !armed.port.addresses.is_empty()) {
        let addresses = armed.port.addresses.clone();
        out.push(Output::RemoveRoutes { addresses });
    }
}
