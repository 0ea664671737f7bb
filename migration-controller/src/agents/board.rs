//! What is armed on the nodes, what their agents saw, and what is to be done about it at once.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use handover::{Side, Sighting, VmName};
use node_hooks_api::agent as wire;
use node_hooks_api::agent::to_agent::Message;

use super::armed::Armed;
use super::time::Nanos;
use crate::api::{EarlyOpening, Moment, OpeningResult, SignalSeen};

/// How far a node's clock may be from the controller's. What is stamped further away is taken to have
/// happened when it was heard of, and nothing is measured with it.
pub(super) const CLOCK_ERROR: Duration = Duration::from_secs(5);
/// How many farewells are kept for an agent that is away.
const FAREWELLS: usize = 16;

/// A handover as the agents of both its ends are to know it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Standing {
    /// The VirtualMachineInstance.
    pub(crate) vm: VmName,
    /// UID of the migration.
    pub(crate) migration: String,
    /// Its epoch.
    pub(crate) epoch: u64,
    /// Where the guest leaves.
    pub(crate) source: Post,
    /// Where it goes.
    pub(crate) target: Post,
    /// The barrier is met: the target can be opened.
    pub(crate) prepared: bool,
    /// The record has it that the guest paused.
    pub(crate) paused: bool,
}

/// One end of a handover.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Post {
    /// The Kubernetes node, as its agent calls itself.
    pub(crate) node: String,
    /// The VM's ports there, in the order in which the other end has them.
    pub(crate) ports: Vec<wire::Port>,
}

/// What the agents have told of one handover.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Learned {
    /// Signs of where the guest is.
    pub(crate) signals: Vec<SignalSeen>,
    /// Of these, the pauses of the guest and its resuming on the source, where their stamps are of their node's clock. They
    /// can happen again.
    pub(crate) turns: Vec<SignalSeen>,
    /// How the target was opened early.
    pub(crate) opening: Option<EarlyOpening>,
    /// When it was open.
    pub(crate) opened_at: Option<Moment>,
    /// How long the hypervisors had the guest stopped.
    pub(crate) pause_ms: Option<f64>,
    /// From the last frame on the source to the first from the target.
    pub(crate) blackout_ms: Option<f64>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Order {
    /// Tell a node's agent, if it is there.
    Tell { node: String, message: Message },
    /// Have the target's agent open the ports.
    Open {
        vm: VmName,
        node: String,
        open: wire::Open,
    },
    /// Look at the VM.
    Wake(VmName),
}

/// What became of something that an agent told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Taken {
    /// It was news.
    New,
    /// It had been told before.
    Known,
    /// It is not this agent's to tell, of no handover that is armed, or makes no sense.
    Refused,
}

/// All that is armed, by VM.
#[derive(Debug, Default)]
pub(super) struct Board {
    armed: BTreeMap<VmName, Armed>,
    /// What agents that were away have to be told, by node.
    farewells: BTreeMap<String, VecDeque<wire::Disarm>>,
    commands: u64,
}

// === impl Board ===

impl Board {
    /// Takes in how a VM's handover stands; `None` where nothing is to be armed, with the node where
    /// the guest runs.
    pub(super) fn stand(
        &mut self,
        vm: &VmName,
        standing: Option<Standing>,
        guest_on: Option<&str>,
    ) -> Vec<Order> {
        let mut orders = Vec::new();
        let Some(standing) = standing else {
            if let Some(armed) = self.armed.remove(vm) {
                armed.say_farewell(&[], guest_on, &mut orders);
            }
            return orders;
        };
        let nodes = [standing.source.node.clone(), standing.target.node.clone()];
        for node in &nodes {
            if let Some(farewells) = self.farewells.get_mut(node) {
                farewells.retain(|disarm| !disarm.id.as_ref().is_some_and(|id| is_of(id, vm)));
            }
        }
        match self.armed.get_mut(vm) {
            Some(armed) if armed.is_same(&standing) => armed.update(standing, &mut orders),
            _ => {
                let guest_on = standing.source.node.clone();
                if let Some(before) = self.armed.insert(vm.clone(), Armed::new(standing)) {
                    before.say_farewell(&nodes, Some(&guest_on), &mut orders);
                }
            }
        }
        if let Some(armed) = self.armed.get_mut(vm) {
            for side in [Side::Source, Side::Target] {
                armed.arm(side, &mut orders);
            }
        }
        orders
    }

    /// What an agent that has just connected is to be told.
    pub(super) fn greet(&mut self, node: &str) -> Vec<Order> {
        let farewells = self.farewells.remove(node).unwrap_or_default();
        let tell = |disarm| Order::Tell {
            node: node.to_owned(),
            message: Message::Disarm(disarm),
        };
        let mut orders: Vec<_> = farewells.into_iter().map(tell).collect();
        for armed in self.armed.values_mut() {
            let Some(side) = armed.side_of(node) else {
                continue;
            };
            *armed.told.get_mut(side) = None;
            armed.arm(side, &mut orders);
            if side == Side::Target {
                armed.open(&mut self.commands, &mut orders);
            }
        }
        orders
    }

    /// Keeps a farewell for an agent that is away.
    pub(super) fn keep(&mut self, node: &str, disarm: wire::Disarm) {
        let farewells = self.farewells.entry(node.to_owned()).or_default();
        if farewells.len() == FAREWELLS {
            farewells.pop_front();
        }
        farewells.push_back(disarm);
    }

    /// Takes in what the agent of a node saw.
    pub(super) fn saw(
        &mut self,
        node: &str,
        signal: &wire::Signal,
        now: Nanos,
    ) -> (Taken, Vec<Order>) {
        use wire::signal::Kind;
        let mut orders = Vec::new();
        let Some((armed, side)) = find(&mut self.armed, node, signal.id.as_ref()) else {
            return (Taken::Refused, orders);
        };
        let sighting = match signal.kind() {
            Kind::LastFrame | Kind::FirstFrame => return (armed.framed(side, signal, now), orders),
            Kind::Paused => Sighting::Stopped,
            Kind::Resumed => Sighting::Runs,
            Kind::Left => Sighting::Left,
            Kind::Unspecified => return (Taken::Refused, orders),
        };
        let taken = armed.sighted(side, sighting, signal, now);
        if taken == Taken::New {
            if sighting == Sighting::Stopped {
                armed.open(&mut self.commands, &mut orders);
            } else if side == Side::Source && sighting == Sighting::Runs {
                armed.announce(&mut self.commands, &mut orders);
            }
            orders.push(Order::Wake(armed.standing.vm.clone()));
        }
        (taken, orders)
    }

    /// Takes in what came of a command. What came of an opening is news.
    pub(super) fn answered(&mut self, node: &str, outcome: &wire::Outcome) -> Option<Order> {
        let (armed, side) = find(&mut self.armed, node, outcome.id.as_ref())?;
        let opening = armed.opening.as_mut().filter(|_| side == Side::Target)?;
        let awaited = opening.command == outcome.command;
        if !awaited || opening.result != OpeningResult::Asked {
            return None;
        }
        opening.answered(outcome);
        Some(Order::Wake(armed.standing.vm.clone()))
    }

    /// Whether this is what came of an order to open.
    pub(super) fn is_of_opening(&mut self, node: &str, outcome: &wire::Outcome) -> bool {
        let Some((armed, Side::Target)) = find(&mut self.armed, node, outcome.id.as_ref()) else {
            return false;
        };
        let opening = armed.opening.as_ref();
        opening.is_some_and(|opening| opening.command == outcome.command)
    }

    /// The order to open reached nobody.
    pub(super) fn unopened(&mut self, vm: &VmName) {
        let armed = self.armed.get_mut(vm);
        if let Some(opening) = armed.and_then(|armed| armed.opening.as_mut()) {
            opening.unasked();
        }
    }

    /// What has been told of a migration of the VM.
    pub(super) fn learned(&self, vm: &VmName, migration: &str) -> Learned {
        let armed = self.armed.get(vm);
        let armed = armed.filter(|armed| armed.standing.migration == migration);
        armed.map(Armed::learned).unwrap_or_default()
    }
}

/// The handover that a message is about, and the side that its node is of it; nothing where it is
/// about none that is armed, or the node is none of its ends.
fn find<'a>(
    armed: &'a mut BTreeMap<VmName, Armed>,
    node: &str,
    id: Option<&wire::HandoverId>,
) -> Option<(&'a mut Armed, Side)> {
    let id = id?;
    let armed = armed.get_mut(&VmName::new(&id.namespace, &id.vm))?;
    let standing = &armed.standing;
    let is_meant = standing.migration == id.migration_uid && standing.epoch == id.epoch;
    let side = armed.side_of(node).filter(|_| is_meant)?;
    Some((armed, side))
}

fn is_of(id: &wire::HandoverId, vm: &VmName) -> bool {
    id.namespace == vm.namespace && id.vm == vm.name
}

// === impl Standing ===

impl Standing {
    pub(super) fn id(&self) -> wire::HandoverId {
        wire::HandoverId {
            namespace: self.vm.namespace.clone(),
            vm: self.vm.name.clone(),
            migration_uid: self.migration.clone(),
            epoch: self.epoch,
        }
    }

    pub(super) fn post(&self, side: Side) -> &Post {
        match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        }
    }

    pub(super) fn arm(&self, side: Side) -> wire::Arm {
        wire::Arm {
            id: Some(self.id()),
            side: match side {
                Side::Source => wire::Side::Source,
                Side::Target => wire::Side::Target,
            }
            .into(),
            ports: self.post(side).ports.clone(),
            domain: String::new(),
            // Whether a node has any is its agent's own setting.
            routes: Some(wire::HostRoutes { wanted: true }),
            guest_here: None,
        }
    }

    pub(super) fn disarm(&self, side: Side, stays: bool) -> Order {
        Order::Tell {
            node: self.post(side).node.clone(),
            message: Message::Disarm(wire::Disarm {
                id: Some(self.id()),
                stays,
            }),
        }
    }
}
