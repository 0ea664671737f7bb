//! One handover that is armed, and how an [`Arm`] is read: it comes from outside, and may be nonsense.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use arp_proxy::Mac;
use node_hooks_api::agent::{self, Arm, HandoverId, Hops, PortReport, Reopened};

use super::reopen::Reopening;
use super::seen::Seen;
use super::vm::{Vm, is_name};
use crate::openflow::PacketOuts;
use crate::ovs::Interfaces;
use crate::time::Nanos;

/// The most ports of a VM: a PCI bus has 32 slots, KubeVirt's limit is lower.
const MOST_PORTS: usize = 64;
/// The most addresses of a port.
const MOST_ADDRESSES: usize = 64;

/// Which end of the handover this node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Target,
}

/// A port as the controller describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) name: String,
    /// None where the controller does not know it: OVN has the port's addresses as `unknown`.
    pub(super) mac: Option<Mac>,
    pub(super) addresses: Vec<IpAddr>,
}

/// What an [`Arm`] asks for, once it is known to make sense.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) vm: Vm,
    pub(super) id: HandoverId,
    pub(super) side: Side,
    pub(super) domain: String,
    pub(super) ports: Vec<Port>,
    pub(super) routes: bool,
    /// Whether the guest runs here, where the controller knows.
    pub(super) guest_here: Option<bool>,
}

/// A handover that is armed.
#[derive(Debug)]
pub(super) struct Armed {
    pub(super) id: HandoverId,
    pub(super) side: Side,
    pub(super) domain: String,
    pub(super) ports: Vec<ArmedPort>,
    /// Whether the ports' addresses get host routes where the guest runs.
    pub(super) routes: bool,
    /// Whether the guest runs here, as far as is known.
    pub(super) here: bool,
    pub(super) opening: Opening,
    pub(super) reopening: Reopening,
    /// What opens the ports: ready before it is needed. None while an interface is missing.
    pub(super) prebuilt: Option<Arc<PacketOuts>>,
    pub(super) seen: Seen,
    /// When the agent announced by itself that the guest is back.
    pub(super) returned: Option<Instant>,
    /// When a controller last spoke of it, or the stream that it did on was lost.
    pub(super) contact: Instant,
    /// Whether a controller spoke of it on the stream that is there.
    pub(super) on_this_stream: bool,
}

/// A port of a handover that is armed.
#[derive(Debug)]
pub(super) struct ArmedPort {
    pub(super) port: Port,
    /// The interface that has the addresses' routes.
    pub(super) routed: Option<String>,
    /// A frame of the guest's was seen after it came here.
    pub(super) first_frame: bool,
    /// A frame came in by it that was not taken for the guest's.
    pub(super) passed_over: bool,
    /// How often it was opened without a command.
    pub(super) reopened: Option<Reopened>,
    reported: Option<PortReport>,
}

/// How far the early opening is. Several commands to open are one.
#[derive(Debug)]
pub(super) enum Opening {
    Not,
    UnderWay {
        serial: u64,
        commands: Vec<u64>,
        /// What was being written.
        frames: Arc<PacketOuts>,
    },
    Done {
        command: u64,
        hops: Hops,
    },
}

impl TryFrom<Arm> for Plan {
    /// What does not make sense, for people.
    type Error = String;

    fn try_from(arm: Arm) -> Result<Self, String> {
        let side = match arm.side() {
            agent::Side::Source => Side::Source,
            agent::Side::Target => Side::Target,
            agent::Side::Unspecified => return Err("the command names no side".into()),
        };
        let id = arm.id.ok_or("the command names no handover")?;
        let vm = Vm::of(&id).ok_or("the command's handover has no name or UID")?;
        let domain = match arm.domain {
            unset if unset.is_empty() => vm.domain(),
            domain if is_name(&domain) => domain,
            domain => return Err(format!("a domain's name of {} bytes", domain.len())),
        };
        if arm.ports.len() > MOST_PORTS {
            let count = arm.ports.len();
            return Err(format!("{count} ports, expected at most {MOST_PORTS}"));
        }
        let ports: Vec<Port> = arm
            .ports
            .into_iter()
            .map(Port::try_from)
            .collect::<Result<_, _>>()?;
        let names: BTreeSet<_> = ports.iter().map(|port| &port.name).collect();
        if names.len() < ports.len() {
            return Err("a port is named twice".into());
        }
        Ok(Self {
            vm,
            id,
            side,
            domain,
            ports,
            routes: arm.routes.is_some_and(|routes| routes.wanted),
            guest_here: arm.guest_here,
        })
    }
}

impl TryFrom<agent::Port> for Port {
    type Error = String;

    fn try_from(port: agent::Port) -> Result<Self, String> {
        let agent::Port {
            name,
            mac,
            addresses,
        } = port;
        if !is_name(&name) {
            return Err(format!("a port's name of {} bytes", name.len()));
        }
        let mac = match mac.as_str() {
            "" => None,
            mac => Some(station(mac).map_err(|wrong| format!("port {name}: {wrong}"))?),
        };
        if addresses.len() > MOST_ADDRESSES {
            return Err(format!("port {name}: more than {MOST_ADDRESSES} addresses"));
        }
        let addresses: Vec<IpAddr> = addresses
            .iter()
            .map(|address| address.parse())
            .collect::<Result<_, _>>()
            .map_err(|_| format!("port {name}: not all of its addresses are any"))?;
        let usable = |address: &IpAddr| {
            !(address.is_unspecified() || address.is_multicast() || address.is_loopback())
        };
        if !addresses.iter().all(usable) {
            return Err(format!("port {name}: an address that no guest can have"));
        }
        Ok(Self {
            name,
            mac,
            addresses,
        })
    }
}

/// The MAC that a machine can have.
fn station(mac: &str) -> Result<Mac, String> {
    let mac: Mac = mac.parse().map_err(|_| "its MAC is none".to_owned())?;
    if mac.is_multicast() || mac == Mac::zero() {
        return Err(format!("{mac} is no station's MAC"));
    }
    Ok(mac)
}

impl Armed {
    pub(super) fn new(plan: Plan, now: Instant) -> Self {
        let ports = plan.ports.into_iter().map(ArmedPort::new).collect();
        Self {
            id: plan.id,
            side: plan.side,
            domain: plan.domain,
            ports,
            routes: plan.routes,
            here: plan.guest_here.unwrap_or(plan.side == Side::Source),
            opening: Opening::Not,
            reopening: Reopening::new(plan.guest_here == Some(true)),
            prebuilt: None,
            seen: Seen::default(),
            returned: None,
            contact: now,
            on_this_stream: false,
        }
    }

    /// Takes over what differs in `plan`, of the same handover and side. The ports that are no longer
    /// in it, for their routes' sake, and the commands whose opening no longer counts.
    pub(super) fn update(&mut self, plan: Plan) -> (Vec<ArmedPort>, Vec<u64>) {
        let stations = |ports: &mut dyn Iterator<Item = &Port>| -> BTreeSet<(String, Option<Mac>)> {
            ports.map(|port| (port.name.clone(), port.mac)).collect()
        };
        let before = stations(&mut self.ports.iter().map(|armed| &armed.port));
        let mut unanswered = Vec::new();
        if before != stations(&mut plan.ports.iter())
            && let Opening::UnderWay { commands, .. } =
                std::mem::replace(&mut self.opening, Opening::Not)
        {
            unanswered = commands;
        }
        let mut old = std::mem::take(&mut self.ports);
        for port in plan.ports {
            let same = |armed: &ArmedPort| armed.port == port;
            let armed = match old.iter().position(same) {
                Some(index) => old.swap_remove(index),
                None => ArmedPort::new(port),
            };
            self.ports.push(armed);
        }
        self.domain = plan.domain;
        self.routes = plan.routes;
        if let Some(here) = plan.guest_here.filter(|_| !self.seen.is_any()) {
            self.here = here;
            self.reopening.guest_runs = here;
        }
        (old, unanswered)
    }

    /// Makes what opens the ports, from the interfaces as they are. Where they are others than those
    /// that were opened, they have still to be; of an opening under way that is seen at its end.
    pub(super) fn prebuild(&mut self, interfaces: &Interfaces) {
        let prebuilt = self.packets(interfaces);
        if self.prebuilt.as_deref() == prebuilt.as_ref() {
            return;
        }
        self.prebuilt = prebuilt.map(Arc::new);
        if matches!(self.opening, Opening::Done { .. }) {
            self.opening = Opening::Not;
            self.reopening.commanded = None;
        }
    }

    fn packets(&self, interfaces: &Interfaces) -> Option<PacketOuts> {
        if self.side == Side::Source || self.ports_with_mac().next().is_none() {
            return None;
        }
        let stations: Vec<_> = self
            .ports_with_mac()
            .map(|(armed, mac)| Some((armed.number(interfaces)?, mac)))
            .collect::<Option<_>>()?;
        PacketOuts::opening(stations).ok()
    }

    /// The node's routes still lead here, and the guest, as the controller says, has gone: to an agent that was not there
    /// when it went.
    pub(super) fn has_lost_its_guest(&self) -> bool {
        self.side == Side::Source && self.routes && !self.here && !self.seen.is_any()
    }

    /// The ports whose MAC is known.
    pub(super) fn ports_with_mac(&self) -> impl Iterator<Item = (&ArmedPort, Mac)> {
        self.ports
            .iter()
            .filter_map(|armed| Some((armed, armed.port.mac?)))
    }

    /// The ports whose MAC is known and that the switch has, by number.
    pub(super) fn stations(&self, interfaces: &Interfaces) -> impl Iterator<Item = (u16, Mac)> {
        let with_mac = self.ports_with_mac();
        with_mac.filter_map(|(armed, mac)| Some((armed.number(interfaces)?, mac)))
    }

    /// The ports that the switch has no interface for, by name.
    pub(super) fn missing(&self, interfaces: &Interfaces) -> String {
        let missing = self.ports_with_mac().map(|(armed, _)| armed);
        names(missing.filter(|armed| armed.number(interfaces).is_none()))
    }

    /// Which ports are left to OVN, for people, where there are any.
    pub(super) fn left_out(&self) -> Option<String> {
        if self.ports.is_empty() {
            return Some("no port of the VM was named: OVN alone opens what it has".to_owned());
        }
        let left_out = names(self.ports.iter().filter(|armed| armed.port.mac.is_none()));
        (!left_out.is_empty()).then(|| {
            format!("the MAC of {left_out} is not known (addresses=unknown?): OVN alone opens that")
        })
    }

    /// How the ports stand, where that is news; with `all`, of every port.
    pub(super) fn reports(&mut self, interfaces: &Interfaces, all: bool) -> Vec<PortReport> {
        let mut news = Vec::new();
        for armed in &mut self.ports {
            let report = report(&self.id, armed, interfaces);
            if all || armed.reported.as_ref() != Some(&report) {
                news.push(report.clone());
                armed.reported = Some(report);
            }
        }
        news
    }
}

impl ArmedPort {
    fn new(port: Port) -> Self {
        Self {
            port,
            routed: None,
            first_frame: false,
            passed_over: false,
            reopened: None,
            reported: None,
        }
    }

    /// Its number in OpenFlow, once the switch has it.
    pub(super) fn number(&self, interfaces: &Interfaces) -> Option<u16> {
        u16::try_from(interfaces.get(&self.port.name)?.ofport?).ok()
    }
}

fn names<'a>(ports: impl Iterator<Item = &'a ArmedPort>) -> String {
    let names: Vec<_> = ports.map(|armed| armed.port.name.as_str()).collect();
    names.join(", ")
}

fn report(id: &HandoverId, armed: &ArmedPort, interfaces: &Interfaces) -> PortReport {
    let port = &armed.port.name;
    let found = interfaces.get(port);
    let statistics = found
        .map(|interface| interface.statistics)
        .unwrap_or_default();
    PortReport {
        id: Some(id.clone()),
        port: port.clone(),
        present: found.is_some(),
        ovn_installed: found.is_some_and(|interface| interface.installed),
        rx_packets: statistics.rx_packets,
        tx_packets: statistics.tx_packets,
        tx_dropped: statistics.tx_dropped,
        reopened: armed.reopened,
    }
}

/// The stamps of an opening as they are told.
pub(super) fn hops(received: Nanos, sent: Nanos, processed: Option<Nanos>) -> Hops {
    Hops {
        received_at_ns: received.0,
        sent_at_ns: sent.0,
        processed_at_ns: processed.map_or(0, |at| at.0),
    }
}
