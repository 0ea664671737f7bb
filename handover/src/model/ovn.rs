//! OVN: northd, the ovn-controllers, and what opens ports.

use std::collections::{BTreeMap, BTreeSet};

use super::World;
use crate::{Binding, Chassis, PortName};

/// What the Southbound holds, and what the ovn-controllers have made of it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(in crate::model) struct Southbound {
    /// What northd has compiled of the Northbound.
    requested: BTreeMap<PortName, Vec<String>>,
    strategies: BTreeSet<PortName>,
    nb_cfg: i64,
    pub(super) bindings: BTreeMap<PortName, Binding>,
    pub(super) activated: BTreeMap<PortName, BTreeSet<String>>,
    pub(super) applied: BTreeMap<String, i64>,
    /// Where an ovn-controller has flows that shut a port.
    shut: BTreeSet<(PortName, String)>,
    /// Where an agent has removed them; a new ovn-controller knows nothing of that.
    removed: BTreeSet<(PortName, String)>,
    dead: BTreeSet<usize>,
}

impl Southbound {
    pub(super) fn new(names: &[PortName]) -> Self {
        let bindings = names.iter().map(|name| (name.clone(), Binding::default()));
        let activated = names.iter().map(|name| (name.clone(), BTreeSet::new()));
        Self {
            bindings: bindings.collect(),
            activated: activated.collect(),
            ..Self::default()
        }
    }

    pub(super) fn dies(&mut self, node: usize) {
        self.dead.insert(node);
    }

    /// Whatever `chassis` had of the VM is another interface from now on.
    pub(super) fn new_interface(&mut self, chassis: &str) {
        for activated in self.activated.values_mut() {
            activated.remove(chassis);
        }
    }

    /// Whether a guest on `chassis` has the port's traffic.
    pub(super) fn reaches(&self, port: &PortName, chassis: &Chassis) -> bool {
        let binding = &self.bindings[port];
        let shut = self.shut.contains(&(port.clone(), chassis.name.clone()));
        binding.is_claimed_by(chassis) && !shut
    }

    /// An announcement came through the port on a chassis whose ovn-controller is there.
    pub(super) fn announced(&mut self, port: &PortName, chassis: &str) {
        let additional = &self.bindings[port].additional;
        if additional.iter().any(|name| name == chassis)
            && self.strategies.contains(port)
            && let Some(activated) = self.activated.get_mut(port)
        {
            activated.insert(chassis.to_owned());
            self.shut.remove(&(port.clone(), chassis.to_owned()));
        }
    }
}

impl World {
    pub(super) fn northd(&mut self) {
        self.south.nb_cfg = self.north.nb_cfg;
        let ports = || self.north.ports.iter();
        self.south.requested = ports()
            .map(|(name, config)| {
                let list = config.requested_chassis.as_deref().unwrap_or_default();
                let list = list.split(',').filter(|text| !text.is_empty());
                (name.clone(), list.map(str::to_owned).collect())
            })
            .collect();
        self.south.strategies = ports()
            .filter(|(_, config)| config.activation_strategy.is_some())
            .map(|(name, _)| name.clone())
            .collect();
    }

    pub(super) fn ovn_controller(&mut self, node: usize) {
        if self.south.dead.contains(&node) {
            return;
        }
        let me = &self.chassis[node];
        let south = &mut self.south;
        for (port, binding) in &mut south.bindings {
            let requested = south.requested.get(port).map_or(&[][..], Vec::as_slice);
            let plugged = self.plugged.contains(&(port.clone(), node));
            let rank = requested.iter().position(|text| me.is_named_by(text));
            let main = plugged && (requested.is_empty() || rank == Some(0));
            let additional = plugged && !main && rank.is_some();
            if main {
                binding.chassis = Some(me.name.clone());
            } else if binding.chassis.as_ref() == Some(&me.name) {
                binding.chassis = None;
            }
            binding.additional.retain(|name| *name != me.name);
            let key = (port.clone(), me.name.clone());
            let activated = south.activated.entry(port.clone()).or_default();
            if additional {
                binding.additional.push(me.name.clone());
            } else {
                activated.remove(&me.name);
                south.removed.remove(&key);
            }
            let waits = south.strategies.contains(port) && !activated.contains(&me.name);
            if additional && waits && !south.removed.contains(&key) {
                south.shut.insert(key);
            } else {
                south.shut.remove(&key);
            }
        }
        south.applied.insert(me.name.clone(), south.nb_cfg);
    }

    /// The ovn-controller of a node is there again, if it was away.
    pub(super) fn starts(&mut self, node: usize) {
        if self.south.dead.remove(&node) {
            let name = &self.chassis[node].name;
            self.south.removed.retain(|(_, chassis)| chassis != name);
            self.ovn_controller(node);
        }
    }

    pub(super) fn ovn_settles(&mut self) {
        // Releases first on one round, claims on the next.
        for _ in 0..2 {
            self.northd();
            for node in 0..self.chassis.len() {
                self.ovn_controller(node);
            }
        }
    }

    /// The guest announces itself on a node.
    pub(super) fn announce(&mut self, node: usize) {
        if self.south.dead.contains(&node) {
            return;
        }
        let chassis = self.chassis[node].name.clone();
        for name in self.port_names() {
            self.south.announced(&name, &chassis);
        }
    }

    /// The agent on the target opens what its chassis has, as far as it was told to.
    pub(super) fn open_early(&mut self, position: usize) {
        let (number, target) = {
            let migration = &self.migrations[position];
            (migration.number, migration.target)
        };
        let chassis = self.chassis[target].name.clone();
        if !self.agents || !self.is_prepared(number) {
            return;
        }
        self.migrations[position].opened = true;
        for name in self.port_names() {
            let key = (name, chassis.clone());
            if self.south.bindings[&key.0].additional.contains(&chassis) {
                self.south.shut.remove(&key);
                self.south.removed.insert(key);
            }
        }
        self.announce(target);
    }
}
