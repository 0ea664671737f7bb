//! A model of what surrounds the decisions: OVN with its lag, KubeVirt with its failures, others that
//! write to the same rows, and a controller that crashes and sees things late.
//!
//! The model is pessimistic where the real parts are free to be: northd, each ovn-controller and
//! each of the controller's caches advance one step at a time, in any order; an ovn-controller dies
//! and comes back, an announcement is lost. It keeps to what the real parts guarantee: KubeVirt runs
//! one migration of a VM at a time, a controller's cache of the Northbound holds its own writes, a
//! restarted controller lists Kubernetes afresh, and an old leader's writes are refused by the OVSDB
//! lock.

mod checks;
mod controller;
mod convergence;
mod mends;
mod ovn;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::{Chassis, Decision, FlipPolicy, PortConfig, PortName, RouteKey, Timestamp, Write};
use controller::Controller;
use ovn::Southbound;

/// How far a migration has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Pending,
    TargetKnown,
    TargetPlugged,
    Paused,
    Resumed,
    /// KubeVirt says that the target's domain runs.
    Confirmed,
    Ended,
    OtherUnplugged,
    OtherPodGone,
}

#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each can come true at any stage, independent of the others"
)]
pub(super) struct Migration {
    pub(super) number: u64,
    /// Where the guest was when it was created; once it has begun, where it was then.
    source: usize,
    target: usize,
    pub(super) stage: Stage,
    pub(super) fails: bool,
    /// It was more than pending.
    begun: bool,
    /// The object is gone.
    pub(super) deleted: bool,
    /// An agent had the target opened at the pause.
    opened: bool,
}

impl Migration {
    pub(super) fn is_over(&self) -> bool {
        self.stage >= Stage::Ended
    }

    fn is_in_flight(&self) -> bool {
        self.begun && !self.is_over()
    }
}

/// What a VirtualMachineInstance says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Instance {
    node: usize,
    /// The migration that its state is about, as it was then.
    about: Option<Migration>,
}

/// What the Northbound holds.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Northbound {
    pub(super) ports: BTreeMap<PortName, PortConfig>,
    pub(super) routes: BTreeMap<RouteKey, BTreeSet<String>>,
    nb_cfg: i64,
}

impl Northbound {
    /// What it holds after a write, made as the database makes it: all rows or none, each against its
    /// guards. `None` where it refuses.
    fn with(&self, write: &Write) -> Option<Self> {
        let mut after = self.clone();
        for write in &write.ports {
            let row = after.ports.get_mut(&write.port)?;
            write.check(row).ok()?;
            row.clone_from(&write.config);
        }
        for write in &write.routes {
            let leads_to = after.routes.get_mut(&write.route)?;
            if *leads_to != write.from {
                return None;
            }
            *leads_to = write.to.iter().cloned().collect();
        }
        if let Some(from) = write.raise_nb_cfg_from {
            if from != self.nb_cfg {
                return None;
            }
            after.nb_cfg += 1;
        }
        Some(after)
    }
}

/// How the VM's routes are laid out.
#[derive(Clone, Debug, Default)]
pub(super) struct Routing {
    /// How many routes there are; the chassis are the nodes with a gateway.
    pub(super) routes: usize,
    pub(super) gateways: BTreeSet<usize>,
    pub(super) flip: FlipPolicy,
}

/// How the world begins.
#[derive(Clone, Debug, Default)]
pub(super) struct Start {
    pub(super) ports: usize,
    pub(super) requested: Option<&'static str>,
    pub(super) routing: Routing,
    /// Agents tell of what the hypervisors do.
    pub(super) agents: bool,
    /// No announcement of a guest ever reaches OVN.
    pub(super) silent: bool,
}

pub(super) struct World {
    now: Timestamp,
    gateways: BTreeSet<String>,
    flip: FlipPolicy,
    chassis: Vec<Chassis>,
    plugged: BTreeSet<(PortName, usize)>,
    guest: Option<usize>,
    agents: bool,
    silent: bool,
    migrations: Vec<Migration>,
    north: Northbound,
    south: Southbound,
    controller: Controller,
}

/// One thing that happens.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// The migration under way gets further; where there is none, the oldest that waits begins.
    Migrate,
    /// What the last migration left behind goes, step by step.
    CleanUp,
    Fail,
    Create {
        target: usize,
    },
    /// A migration that has not begun fails, or its object is deleted.
    FailPending,
    DeletePending,
    Northd,
    OvnController(usize),
    OvnControllerDies(usize),
    OvnControllerStarts(usize),
    SeeInstance,
    SeeMigrations,
    SeeOvn,
    Act,
    ActWithoutEffect,
    Restart,
    TimePasses,
    Foreign(Foreign),
}

/// What another writer does, to every port of the VM, without a guard.
#[derive(Clone, Copy, Debug)]
pub(super) enum Foreign {
    /// Replaces `external_ids`.
    Ids,
    /// Removes the request and the strategy.
    Strip,
    /// Requests both ends of the migration under way, by hostname where they have one.
    List,
    /// Requests the node that KubeVirt says has the guest, once a migration is over.
    Reduce,
}

const MOST_MIGRATIONS: usize = 4;

impl World {
    /// A VM on node 0, about to migrate to node 1; node 2 is a bystander.
    pub(super) fn new(start: &Start) -> Self {
        let chassis = vec![
            Chassis::new("n0", "n0.example"),
            Chassis::new("n1", "n1.example"),
            Chassis::new("n2", ""),
        ];
        let names: Vec<_> = (0..start.ports)
            .map(|number| PortName::new(format!("vm-{number}")))
            .collect();
        let is_list = start.requested.is_some_and(|list| list.contains(','));
        let config = PortConfig {
            requested_chassis: start.requested.map(str::to_owned),
            activation_strategy: is_list.then(|| "rarp".to_owned()),
            mark: None,
        };
        let routing = &start.routing;
        let north = Northbound {
            ports: names
                .iter()
                .map(|name| (name.clone(), config.clone()))
                .collect(),
            routes: (0..routing.routes)
                .map(|number| (RouteKey::new(format!("r-{number}")), BTreeSet::new()))
                .collect(),
            nb_cfg: 0,
        };
        let gateways = routing.gateways.iter();
        let mut world = Self {
            now: Timestamp(1_000_000),
            gateways: gateways.map(|&node| chassis[node].name.clone()).collect(),
            flip: routing.flip,
            plugged: names.iter().map(|name| (name.clone(), 0)).collect(),
            guest: Some(0),
            agents: start.agents,
            silent: start.silent,
            controller: Controller::new(&north),
            migrations: Vec::new(),
            south: Southbound::new(&names),
            chassis,
            north,
        };
        world.ovn_settles();
        if is_list {
            // Whatever left the list behind had the guest announce itself.
            for name in &names {
                world.south.announced(name, "n0");
            }
            world.ovn_settles();
        }
        world.create(1);
        world.restart();
        world
    }

    pub(super) fn happen(&mut self, event: &Event) {
        match event {
            Event::Migrate if self.guest.is_some() => self.migrate(),
            Event::CleanUp if self.in_flight().is_none() => self.clean_up(),
            Event::Migrate | Event::CleanUp => {}
            Event::Fail => self.fail(),
            Event::Create { target } => self.create(*target),
            Event::FailPending => self.end_pending(false),
            Event::DeletePending => self.end_pending(true),
            Event::Northd => self.northd(),
            Event::OvnController(node) => self.ovn_controller(*node),
            Event::OvnControllerDies(node) => self.south.dies(*node),
            Event::OvnControllerStarts(node) => self.starts(*node),
            Event::SeeInstance => self.controller.instance = self.instance(),
            Event::SeeMigrations => self.see_migrations(),
            Event::SeeOvn => self.see_ovn(),
            Event::Act => drop(self.act(true)),
            Event::ActWithoutEffect => drop(self.act(false)),
            Event::Restart => self.restart(),
            Event::TimePasses => self.pass(Duration::from_millis(700)),
            Event::Foreign(what) => self.foreign(*what),
        }
    }

    /// The node where the guest runs.
    pub(super) fn guest(&self) -> Option<&Chassis> {
        self.guest.map(|node| &self.chassis[node])
    }

    fn pass(&mut self, duration: Duration) {
        self.now = self.now.after(duration);
    }

    fn port_names(&self) -> Vec<PortName> {
        self.north.ports.keys().cloned().collect()
    }

    // === Kubernetes and the guest ===

    fn create(&mut self, target: usize) {
        let Some(guest) = self.guest.filter(|guest| *guest != target) else {
            return;
        };
        if self.migrations.len() < MOST_MIGRATIONS {
            self.migrations.push(Migration {
                number: self.migrations.len() as u64 + 1,
                source: guest,
                target,
                stage: Stage::Pending,
                fails: false,
                begun: false,
                deleted: false,
                opened: false,
            });
        }
    }

    fn in_flight(&self) -> Option<usize> {
        self.migrations.iter().position(Migration::is_in_flight)
    }

    fn migrate(&mut self) {
        match self.in_flight() {
            Some(position) => self.advance(position),
            None => self.begin(),
        }
    }

    fn begin(&mut self) {
        let waits = |migration: &&mut Migration| migration.stage == Stage::Pending;
        let Some(guest) = self.guest else { return };
        if let Some(next) = self.migrations.iter_mut().find(waits) {
            next.source = guest;
            if next.target == guest {
                next.target = (guest + 1) % 3;
            }
            next.begun = true;
            next.stage = Stage::TargetKnown;
            let target = next.target;
            // What those before left behind has gone by then.
            self.plugged.retain(|(_, node)| *node == guest);
            self.south.new_interface(&self.chassis[target].name);
            let over = |migration: &&mut Migration| migration.is_over();
            for migration in self.migrations.iter_mut().filter(over) {
                migration.stage = Stage::OtherPodGone;
            }
        }
    }

    fn advance(&mut self, position: usize) {
        let migration = &mut self.migrations[position];
        let (source, target, fails) = (migration.source, migration.target, migration.fails);
        migration.stage = match migration.stage {
            Stage::Pending => Stage::TargetKnown,
            Stage::TargetKnown => Stage::TargetPlugged,
            Stage::TargetPlugged => Stage::Paused,
            Stage::Paused => Stage::Resumed,
            Stage::Resumed => Stage::Confirmed,
            _ => Stage::Ended,
        };
        match migration.stage {
            Stage::TargetPlugged => {
                let names = self.port_names().into_iter();
                self.plugged.extend(names.map(|name| (name, target)));
            }
            Stage::Paused => self.open_early(position),
            Stage::Resumed => {
                self.guest = Some(if fails { source } else { target });
                if !fails && !self.silent {
                    self.announce(target);
                }
            }
            _ => {}
        }
    }

    /// What the last migration that began left behind.
    fn clean_up(&mut self) {
        let over = |migration: &&mut Migration| migration.begun && migration.is_over();
        let Some(migration) = self.migrations.iter_mut().rev().find(over) else {
            return;
        };
        let left = if migration.fails {
            migration.target
        } else {
            migration.source
        };
        migration.stage = match migration.stage {
            Stage::Ended => Stage::OtherUnplugged,
            _ => Stage::OtherPodGone,
        };
        if self.guest != Some(left) {
            self.plugged.retain(|(_, node)| *node != left);
        }
    }

    fn fail(&mut self) {
        if let Some(position) = self.in_flight() {
            let migration = &mut self.migrations[position];
            migration.fails |= migration.stage < Stage::Resumed;
        }
    }

    fn end_pending(&mut self, deleted: bool) {
        let waits = |migration: &&mut Migration| migration.stage == Stage::Pending;
        if let Some(last) = self.migrations.iter_mut().rev().find(waits) {
            last.fails = true;
            last.deleted = deleted;
            last.stage = Stage::OtherPodGone;
        }
    }

    fn instance(&self) -> Instance {
        let told =
            |migration: &&Migration| migration.begun && migration.stage >= Stage::TargetPlugged;
        let moving = self
            .in_flight()
            .map(|position| self.migrations[position].source);
        Instance {
            node: moving.or(self.guest).unwrap_or_default(),
            about: self.migrations.iter().rfind(told).cloned(),
        }
    }

    /// The VM is deleted, and its owner asks for another place.
    pub(super) fn vanish(&mut self, choice: &str) {
        self.guest = None;
        self.plugged.clear();
        for config in self.north.ports.values_mut() {
            config.requested_chassis = Some(choice.to_owned());
        }
    }

    // === Other writers ===

    fn foreign(&mut self, what: Foreign) {
        let hostname = |chassis: &Chassis| {
            let names = [&chassis.hostname, &chassis.name];
            let name = names.into_iter().find(|name| !name.is_empty());
            name.cloned().unwrap_or_default()
        };
        let ends = self.in_flight().map(|position| {
            let migration = &self.migrations[position];
            let ends = [migration.source, migration.target];
            ends.map(|node| hostname(&self.chassis[node])).join(",")
        });
        let over = self.in_flight().is_none();
        let here = self.guest().map(hostname);
        for config in self.north.ports.values_mut() {
            match (what, &ends) {
                (Foreign::Ids, _) => config.mark = None,
                (Foreign::Strip, _) => {
                    config.requested_chassis = None;
                    config.activation_strategy = None;
                }
                (Foreign::List, Some(ends)) => {
                    // Whatever it is called, it is not written twice; and not where it is past.
                    let is_list = |list: &String| list.contains(',');
                    if !config.requested_chassis.as_ref().is_some_and(is_list) {
                        config.requested_chassis = Some(ends.clone());
                        config.activation_strategy = Some("rarp".to_owned());
                    }
                }
                (Foreign::Reduce, _) if over => {
                    config.requested_chassis.clone_from(&here);
                    config.activation_strategy = None;
                }
                _ => {}
            }
        }
    }

    /// Lets everything that can happen still happen: the migrations end (and, unless it `lingers`,
    /// what the last one left behind goes), OVN and the caches catch up, the controller acts until it
    /// has nothing to write. Returns the last decisions.
    pub(super) fn come_to_rest(&mut self, lingers: bool) -> Vec<Decision> {
        let waits = |migration: &Migration| !migration.is_over();
        while self.guest.is_some() && self.migrations.iter().any(waits) {
            self.migrate();
        }
        for _ in 0..if lingers { 0 } else { 2 } {
            self.clean_up();
        }
        for _ in 0..40 {
            self.catch_up();
            let decisions = self.act(true);
            let at_rest = decisions.iter().all(|decision| decision.write.is_none());
            let mut wakes = decisions.iter().filter_map(|decision| decision.wake_at);
            let waits = wakes.any(|at| at > self.now);
            self.pass(Duration::from_secs(40));
            if at_rest && !waits {
                return decisions;
            }
        }
        unreachable!("the controller never comes to rest: {:?}", self.north);
    }

    /// OVN and the controller's caches catch up with the world.
    fn catch_up(&mut self) {
        for node in 0..self.chassis.len() {
            self.starts(node);
        }
        self.ovn_settles();
        self.see_migrations();
        self.controller.instance = self.instance();
        self.see_ovn();
    }
}
