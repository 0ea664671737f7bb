//! What is observed of what is armed: the hypervisor's events, frames, interfaces.

use std::sync::Arc;
use std::time::{Duration, Instant};

use node_hooks_api::agent::signal::{Kind, Source};
use node_hooks_api::agent::{Forgery, Signal, from_agent};

use super::armed::{Armed, Side};
use super::{Core, Counted, Forged, Output, Vm};
use crate::ear::{Heard, HeardFrame};
use crate::openflow::PacketOuts;
use crate::ovs::Interfaces;
use crate::signals::{LifecycleEvent, Origin, Sign};
use crate::time::Nanos;

/// How often a guest's return is announced, at most: a launcher can make up any number of pauses.
const RETURNS: Duration = Duration::from_secs(1);

/// One thing that was seen, where and when.
struct Sighting {
    kind: Kind,
    source: Source,
    at: Nanos,
    seen: Nanos,
    port: String,
}

impl Core {
    /// The path that a guest's pause takes: one look-up, one message.
    pub(super) fn lifecycle(
        &mut self,
        event: &LifecycleEvent,
        now: Instant,
        out: &mut Vec<Output>,
    ) {
        let Some((vm, armed)) = self.domains.get(&event.domain).and_then(|vm| {
            let armed = self.vms.get_mut(vm)?.armed.as_mut()?;
            Some((vm, armed))
        }) else {
            return;
        };
        let kind = match (armed.side, event.sign) {
            (Side::Source, Sign::Paused) => Kind::Paused,
            // libvirt has the same words for a guest that goes on because its migration failed as
            // for one that has arrived: which it is follows from where.
            (Side::Source, Sign::Resumed | Sign::ResumedAfterFailure)
                if armed.seen.is_paused() || armed.seen.is_resumed() =>
            {
                Kind::Resumed
            }
            (Side::Source, Sign::Left) => Kind::Left,
            (Side::Target, Sign::Resumed | Sign::ResumedAfterFailure) => Kind::Resumed,
            (Side::Source, Sign::Resumed | Sign::ResumedAfterFailure)
            | (Side::Target, Sign::Paused | Sign::Left) => return,
        };
        let sighting = Sighting {
            kind,
            source: match event.origin {
                Origin::Libvirt => Source::Libvirt,
                Origin::Qmp => Source::Qmp,
            },
            at: event.at,
            seen: event.seen,
            port: String::new(),
        };
        let was_paused = armed.seen.is_paused();
        if !armed.tell(sighting, self.linked, out) {
            return;
        }
        match kind {
            Kind::Paused if was_paused => {}
            Kind::Paused => ask_last_frames(vm, armed, &self.interfaces, out),
            Kind::Resumed => {
                armed.here = true;
                if armed.side == Side::Source && was_paused {
                    armed.announce_return(&self.interfaces, now, out);
                }
            }
            Kind::Left => armed.here = false,
            Kind::Unspecified | Kind::LastFrame | Kind::FirstFrame => {}
        }
        armed.settle_routes(&self.interfaces, out);
        if armed.side == Side::Target {
            armed.listen_again(&self.interfaces, out);
        }
    }

    pub(super) fn heard(&mut self, frame: &HeardFrame, now: Instant, out: &mut Vec<Output>) {
        let ear = self.ears.get(&frame.interface);
        let Some((ear, armed)) = ear.and_then(|ear| {
            let armed = self.vms.get_mut(&ear.vm)?.armed.as_mut()?;
            Some((ear, armed))
        }) else {
            return self.forged(frame, Forged::NothingMoves, now, out);
        };
        if !frame.own_mac || frame.mac != ear.mac {
            return self.forged(frame, Forged::AnothersAddress, now, out);
        }
        let source = match frame.heard {
            Heard::Rarp => Source::Rarp,
            Heard::Garp => Source::Garp,
            Heard::NeighbourAdvertisement => Source::NeighbourAdvertisement,
            Heard::Frame => Source::Frame,
        };
        if armed.side == Side::Source {
            return self.forged(frame, Forged::OnSource, now, out);
        }
        let interface = self.interfaces.get(&ear.port);
        let is_tap = interface.is_some_and(|interface| interface.is_tap);
        let is_guests = is_tap || source == Source::Rarp || armed.expects_its_guest();
        let mut ports = armed.ports.iter_mut();
        let Some(port) = ports.find(|armed| armed.port.name == ear.port) else {
            return;
        };
        if !is_guests {
            port.passed_over |= source == Source::Frame;
            return self.forged(frame, Forged::BeforeTheGuest, now, out);
        }
        // RARP is QEMU's, and may come before the guest runs; anything else the guest says itself.
        let is_first = source != Source::Rarp && !std::mem::replace(&mut port.first_frame, true);
        let sighting = |kind, source| Sighting {
            kind,
            source,
            at: frame.at,
            seen: frame.seen,
            port: ear.port.clone(),
        };
        if source != Source::Frame {
            armed.tell(sighting(Kind::Resumed, source), self.linked, out);
        }
        if is_first {
            armed.tell(sighting(Kind::FirstFrame, Source::Frame), self.linked, out);
        }
        armed.listen_again(&self.interfaces, out);
        if !std::mem::replace(&mut armed.reopening.guest_runs, true) {
            self.attend(now, out);
        }
    }

    pub(super) fn last_frame(
        &mut self,
        vm: &Vm,
        epoch: u64,
        port: String,
        (at, seen): (Nanos, Nanos),
        out: &mut Vec<Output>,
    ) {
        let armed = self.vms.get_mut(vm).and_then(|known| known.armed.as_mut());
        let Some(armed) = armed.filter(|armed| armed.id.epoch == epoch) else {
            return;
        };
        let sighting = Sighting {
            kind: Kind::LastFrame,
            source: Source::Frame,
            at,
            seen,
            port,
        };
        armed.tell(sighting, self.linked, out);
    }

    pub(super) fn interfaces_are(
        &mut self,
        interfaces: Arc<Interfaces>,
        now: Instant,
        out: &mut Vec<Output>,
    ) {
        self.interfaces = interfaces;
        for armed in self
            .vms
            .values_mut()
            .filter_map(|known| known.armed.as_mut())
        {
            armed.prebuild(&self.interfaces);
            armed.settle_routes(&self.interfaces, out);
            if self.linked && armed.on_this_stream {
                let reports = armed.reports(&self.interfaces, false).into_iter();
                out.extend(reports.map(|report| Output::Say(from_agent::Message::Port(report))));
            }
        }
        self.attend(now, out);
    }

    fn forged(&mut self, frame: &HeardFrame, forged: Forged, now: Instant, out: &mut Vec<Output>) {
        if frame.heard == Heard::Frame {
            // Traffic, not an announcement.
            return;
        }
        out.push(Output::Count(Counted::Forgery(forged)));
        if !self.linked || !self.told.is_due(&frame.interface, forged, now) {
            return;
        }
        let mut ports = self.interfaces.iter();
        let port = ports.find(|(_, interface)| interface.name == frame.interface);
        let forgery = Forgery {
            port: port.map(|(name, _)| name.clone()).unwrap_or_default(),
            mac: frame.mac.to_string(),
            reason: forged.reason().to_owned(),
            at_ns: frame.at.0,
        };
        out.push(Output::Say(from_agent::Message::Forgery(forgery)));
    }
}

impl Armed {
    /// Keeps what was seen and tells it, unless it is known; whether it was news.
    fn tell(&mut self, sighting: Sighting, linked: bool, out: &mut Vec<Output>) -> bool {
        let Sighting { kind, source, .. } = sighting;
        if !self.seen.is_news(kind, source, sighting.at) {
            return false;
        }
        let signal = Signal {
            id: Some(self.id.clone()),
            kind: kind.into(),
            source: source.into(),
            at_ns: sighting.at.0,
            seen_at_ns: sighting.seen.0,
            port: sighting.port,
        };
        if linked {
            out.push(Output::Say(from_agent::Message::Signal(signal.clone())));
        }
        out.push(Output::Count(Counted::Signal(kind, source)));
        self.seen.keep(signal);
        true
    }

    /// Whether what comes from its ports is the guest's, as far as is known.
    ///
    /// A CNI announces the addresses of the pod that it makes on the target, which are the guest's, and so may the pod's
    /// kernel, by the same port; the guest still runs on the source then. A RARP is QEMU's alone.
    fn expects_its_guest(&self) -> bool {
        self.reopening.guest_runs || self.reopening.commanded.is_some() || self.seen.is_resumed()
    }

    /// Waits anew for the first frame by each port where the one that was waited for was not the guest's.
    pub(super) fn listen_again(&mut self, interfaces: &Interfaces, out: &mut Vec<Output>) {
        for armed in &mut self.ports {
            let was_passed_over = std::mem::take(&mut armed.passed_over);
            let interface = interfaces.get(&armed.port.name);
            if let (true, Some(interface), Some(mac)) = (was_passed_over, interface, armed.port.mac)
            {
                out.push(Output::Listen {
                    interface: interface.name.clone(),
                    mac,
                    first_frame: true,
                });
            }
        }
    }

    /// Has the switch, and what is beyond it, learn where the guest is: the target's opening may have been announced there,
    /// and a guest may be silent for long. The controller, who knows of an opening, has the addresses announced, too.
    fn announce_return(&mut self, interfaces: &Interfaces, now: Instant, out: &mut Vec<Output>) {
        let is_due = |at| now.saturating_duration_since(at) >= RETURNS;
        if self.seen.has_left() || !self.returned.is_none_or(is_due) {
            return;
        }
        let packets = PacketOuts::opening(self.stations(interfaces)).ok();
        let Some(packets) = packets.filter(|packets| !packets.is_empty()) else {
            return;
        };
        self.returned = Some(now);
        out.push(Output::Announce {
            id: self.id.clone(),
            command: None,
            packets: Arc::new(packets),
        });
    }

    /// Gives the ports' addresses their routes where the guest runs here, and takes them away where
    /// it does not.
    pub(super) fn settle_routes(&mut self, interfaces: &Interfaces, out: &mut Vec<Output>) {
        for armed in &mut self.ports {
            if armed.port.addresses.is_empty() {
                continue;
            }
            let interface = interfaces.get(&armed.port.name);
            let wanted = (self.here && self.routes)
                .then(|| interface.map(|interface| interface.name.clone()))
                .flatten();
            let addresses = || armed.port.addresses.clone();
            match &wanted {
                Some(interface) if armed.routed.as_ref() != Some(interface) => {
                    out.push(Output::PutRoutes {
                        addresses: addresses(),
                        interface: interface.clone(),
                    });
                }
                None if armed.routed.is_some() => {
                    out.push(Output::RemoveRoutes {
                        addresses: addresses(),
                    });
                }
                Some(_) | None => {}
            }
            armed.routed = wanted;
        }
    }
}

fn ask_last_frames(vm: &Vm, armed: &Armed, interfaces: &Interfaces, out: &mut Vec<Output>) {
    for port in &armed.ports {
        if let Some(interface) = interfaces.get(&port.port.name) {
            out.push(Output::AskLastFrame {
                vm: vm.clone(),
                epoch: armed.id.epoch,
                port: port.port.name.clone(),
                interface: interface.name.clone(),
            });
        }
    }
}
