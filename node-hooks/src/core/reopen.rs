//! Opening a target's ports without being told to: OVN blocks them although the guest is to reach its network here.
//!
//! It happens where an opening is undone, because ovn-controller has started anew and never got the RARP; and where there
//! was none, and OVN does not get the guest's own. What blocks a port is looked for in the switch from the moment on that
//! it is to be open, and removed as often as it is found.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arp_proxy::Mac;
use node_hooks_api::agent::Reopened;
use node_hooks_api::agent::reopened::Reason;

use super::armed::{Armed, Opening, Side};
use super::commands::{GOOD_FOR, say_report};
use super::{Again, Core, Counted, Output, Ticket, Written};
use crate::openflow::PacketOuts;
use crate::ovs::Interfaces;
use crate::time::Nanos;

/// How long after an opening of its own the agent waits before the next; twice as long each time.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest of these waits: no guest is to be cut off for longer than that and a moment.
const LONGEST_WAIT: Duration = Duration::from_millis(800);

/// What a target's agent does about its ports by itself.
#[derive(Debug, Default)]
pub(super) struct Reopening {
    /// When the controller last had the ports opened.
    pub(super) commanded: Option<Instant>,
    /// The guest runs here: a frame of its has come in by a port, or the controller says so.
    pub(super) guest_runs: bool,
    under_way: Option<UnderWay>,
    /// How often the ports were opened so.
    times: u32,
    not_before: Option<Instant>,
}

#[derive(Debug)]
struct UnderWay {
    serial: u64,
    reason: Again,
    ports: BTreeSet<u16>,
}

impl Reopening {
    pub(super) fn new(guest_runs: bool) -> Self {
        Self {
            guest_runs,
            ..Self::default()
        }
    }

    /// Why the ports are to be open, if they are.
    ///
    /// A pause says so only for as long as an order to open because of it would be taken: the guest may have gone on where
    /// it was, of which nobody tells this node. That it runs here says so until the handover is over.
    fn reason(&self, now: Instant) -> Option<Again> {
        let is_fresh = |at| now.saturating_duration_since(at) < GOOD_FOR;
        if self.guest_runs {
            Some(Again::GuestRuns)
        } else {
            self.commanded
                .filter(|&at| is_fresh(at))
                .map(|_| Again::Undone)
        }
    }

    fn may_open(&self, now: Instant) -> bool {
        self.under_way.is_none() && self.not_before.is_none_or(|at| at <= now)
    }
}

impl Core {
    /// The numbers of the ports that are to be open by now.
    pub(super) fn expected_open(&self, now: Instant) -> BTreeSet<u16> {
        let targets = self.armed().filter(|(_, armed)| armed.side == Side::Target);
        let due = targets.filter(|(_, armed)| armed.reopening.reason(now).is_some());
        let stations = due.flat_map(|(_, armed)| armed.stations(&self.interfaces));
        stations.map(|(number, _)| number).collect()
    }

    /// Ports that are to be open were found blocked.
    pub(super) fn blocked(
        &mut self,
        ports: &BTreeSet<u16>,
        at: Nanos,
        now: Instant,
        out: &mut Vec<Output>,
    ) {
        let interfaces = self.interfaces.clone();
        for (vm, known) in &mut self.vms {
            let Some(armed) = known.armed.as_mut() else {
                continue;
            };
            let serial = self.last_serial + 1;
            let Some((reason, frames)) = armed.reopen(ports, serial, &interfaces, now) else {
                continue;
            };
            self.last_serial = serial;
            out.push(Output::Open {
                ticket: Ticket {
                    vm: vm.clone(),
                    serial,
                },
                frames,
                received: at,
                paused_at: Nanos::default(),
                again: Some(reason),
            });
        }
    }

    /// Takes what came of an opening of the agent's own; whether it was one.
    pub(super) fn reopened(
        &mut self,
        ticket: &Ticket,
        result: &Result<Written, String>,
        now: Instant,
        out: &mut Vec<Output>,
    ) -> bool {
        let interfaces = self.interfaces.clone();
        let known = self.vms.get_mut(&ticket.vm);
        let Some(armed) = known.and_then(|known| known.armed.as_mut()) else {
            return false;
        };
        let own = |under_way: &mut UnderWay| under_way.serial == ticket.serial;
        let Some(UnderWay { reason, ports, .. }) = armed.reopening.under_way.take_if(own) else {
            return false;
        };
        let reopening = &mut armed.reopening;
        let wait = FIRST_WAIT * 2_u32.saturating_pow(reopening.times.min(8));
        reopening.times = reopening.times.saturating_add(1);
        reopening.not_before = Some(now + wait.min(LONGEST_WAIT));
        let Ok(written) = result else {
            return true;
        };
        out.push(Output::Count(Counted::Reopened(reason)));
        let at = written.processed.unwrap_or(written.sent);
        armed.note_reopened(&ports, reason, at, &interfaces);
        if self.linked && armed.on_this_stream {
            let reports = armed.reports(&interfaces, false);
            out.extend(reports.into_iter().map(say_report));
        }
        true
    }
}

impl Armed {
    /// What opens those of these ports that are its own and to be open, unless that is being done.
    fn reopen(
        &mut self,
        blocked: &BTreeSet<u16>,
        serial: u64,
        interfaces: &Interfaces,
        now: Instant,
    ) -> Option<(Again, Arc<PacketOuts>)> {
        let is_opening = matches!(self.opening, Opening::UnderWay { .. });
        if self.side != Side::Target || is_opening || !self.reopening.may_open(now) {
            return None;
        }
        let reason = self.reopening.reason(now)?;
        let stations = self
            .stations(interfaces)
            .filter(|(number, _)| blocked.contains(number));
        let (ports, frames) = opening(stations)?;
        self.reopening.under_way = Some(UnderWay {
            serial,
            reason,
            ports,
        });
        Some((reason, Arc::new(frames)))
    }

    fn note_reopened(
        &mut self,
        ports: &BTreeSet<u16>,
        reason: Again,
        at: Nanos,
        interfaces: &Interfaces,
    ) {
        for armed in &mut self.ports {
            let number = armed.number(interfaces);
            if !number.is_some_and(|number| ports.contains(&number)) {
                continue;
            }
            let before = armed.reopened.map_or(0, |reopened| reopened.times);
            armed.reopened = Some(Reopened {
                times: before.saturating_add(1),
                at_ns: at.0,
                reason: Reason::from(reason).into(),
            });
        }
    }
}

/// What opens these ports; nothing where there are none.
fn opening(stations: impl Iterator<Item = (u16, Mac)>) -> Option<(BTreeSet<u16>, PacketOuts)> {
    let stations: BTreeMap<_, _> = stations.collect();
    let ports: BTreeSet<_> = stations.keys().copied().collect();
    let frames = PacketOuts::opening(stations).ok()?;
    (!ports.is_empty()).then_some((ports, frames))
}

impl From<Again> for Reason {
    fn from(again: Again) -> Self {
        match again {
            Again::Undone => Self::Undone,
            Again::GuestRuns => Self::GuestRuns,
        }
    }
}
