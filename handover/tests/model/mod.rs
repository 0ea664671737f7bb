//! A model of what surrounds the decisions: OVN with its lag, KubeVirt with its failures, and a
//! controller that crashes and sees things late.
//!
//! The model is pessimistic where the real parts are free to be: northd, each ovn-controller and
//! the controller's two caches advance one step at a time, in any order. It keeps to what the real
//! parts guarantee: a controller's cache of the Northbound holds its own writes, a restarted
//! controller lists Kubernetes afresh, and an old leader's writes are refused by the OVSDB lock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use handover::{
    Barrier, Binding, Chassis, Deadlines, Decision, Epoch, FlipPolicy, FlipTiming, Identity,
    MigrationUid, Observed, Outcome, Port, PortConfig, PortName, Route, RouteKey, RouteWrite, Side,
    Signal, SignalKind, SignalSource, Signals, Since, Step, Timestamp, Write, decide,
};
use proptest::prelude::*;

/// How far a migration has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Pending,
    TargetKnown,
    TargetPlugged,
    Paused,
    Resumed,
    Ended,
    OtherUnplugged,
    OtherPodGone,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Migration {
    pub(crate) number: u64,
    pub(crate) source: usize,
    pub(crate) target: usize,
    pub(crate) stage: Stage,
    pub(crate) fails: bool,
}

impl Migration {
    /// The node the guest runs on, or was last seen to run on.
    pub(crate) fn guest(&self) -> usize {
        if self.stage >= Stage::Resumed && !self.fails {
            self.target
        } else {
            self.source
        }
    }

    fn left_behind(&self) -> usize {
        if self.fails { self.target } else { self.source }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.stage >= Stage::Ended
    }

    /// Whether the ports are this migration's business and no longer an older one's: it is over, or
    /// knows both its ends. Until then the guest is where the older one left it.
    fn takes_over(&self) -> bool {
        self.stage >= Stage::TargetKnown
    }

    fn outcome(&self) -> Outcome {
        match (self.is_over(), self.fails) {
            (false, _) => Outcome::Running,
            (true, true) => Outcome::GuestOn(Side::Source),
            (true, false) => Outcome::GuestOn(Side::Target),
        }
    }
}

/// What the Northbound holds.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Northbound {
    pub(crate) ports: BTreeMap<PortName, PortConfig>,
    pub(crate) routes: BTreeMap<RouteKey, BTreeSet<String>>,
    pub(crate) nb_cfg: i64,
}

/// How the VM's routes are laid out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Routing {
    /// How many routes there are; the chassis are the nodes with a gateway.
    pub(crate) routes: usize,
    pub(crate) gateways: BTreeSet<usize>,
    pub(crate) flip: FlipPolicy,
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

/// What the Southbound holds.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Southbound {
    /// What northd has compiled of the Northbound.
    requested: BTreeMap<PortName, Vec<String>>,
    nb_cfg: i64,
    pub(crate) bindings: BTreeMap<PortName, Binding>,
    applied: BTreeMap<String, i64>,
}

/// One running controller.
#[derive(Clone, Debug)]
struct Controller {
    migrations: Vec<Migration>,
    north: Northbound,
    south: Southbound,
    since: BTreeMap<u64, Since>,
}

pub(crate) struct World {
    now: Timestamp,
    gateways: BTreeSet<String>,
    flip: FlipPolicy,
    chassis: Vec<Chassis>,
    plugged: BTreeSet<(PortName, usize)>,
    pub(crate) migrations: Vec<Migration>,
    pub(crate) north: Northbound,
    pub(crate) south: Southbound,
    controller: Controller,
}

/// One thing that happens.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Migrate,
    Fail,
    NextMigration { target: usize },
    Northd,
    OvnController(usize),
    SeeKubernetes,
    SeeOvn,
    Act,
    ActWithoutEffect,
    Restart,
    TimePasses,
}

impl World {
    /// A VM with `ports` ports on node 0, about to migrate to node 1; node 2 is a bystander.
    pub(crate) fn new(ports: usize, requested: Option<&str>, routing: &Routing) -> Self {
        let chassis = vec![
            Chassis::new("n0", "n0.example"),
            Chassis::new("n1", "n1.example"),
            Chassis::new("n2", ""),
        ];
        let names: Vec<_> = (0..ports)
            .map(|number| PortName::new(format!("vm-{number}")))
            .collect();
        let config = PortConfig {
            requested_chassis: requested.map(str::to_owned),
            ..PortConfig::default()
        };
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
        let south = Southbound {
            bindings: names
                .iter()
                .map(|name| (name.clone(), Binding::default()))
                .collect(),
            ..Southbound::default()
        };
        let migrations = vec![Migration {
            number: 1,
            source: 0,
            target: 1,
            stage: Stage::Pending,
            fails: false,
        }];
        let gateways = routing.gateways.iter();
        let mut world = Self {
            now: Timestamp(1_000_000),
            gateways: gateways.map(|&node| chassis[node].name.clone()).collect(),
            flip: routing.flip,
            chassis,
            plugged: names.into_iter().map(|name| (name, 0)).collect(),
            controller: Controller {
                migrations: migrations.clone(),
                north: north.clone(),
                south: south.clone(),
                since: BTreeMap::new(),
            },
            migrations,
            north,
            south,
        };
        world.ovn_settles();
        world.restart();
        world
    }

    pub(crate) fn happen(&mut self, event: &Event) {
        match event {
            Event::Migrate => self.migrate(),
            Event::Fail => self.fail(),
            Event::NextMigration { target } => self.next_migration(*target),
            Event::Northd => self.northd(),
            Event::OvnController(node) => self.ovn_controller(*node),
            Event::SeeKubernetes => self.controller.migrations = self.migrations.clone(),
            Event::SeeOvn => self.see_ovn(),
            Event::Act => drop(self.act(true)),
            Event::ActWithoutEffect => drop(self.act(false)),
            Event::Restart => self.restart(),
            Event::TimePasses => self.now = self.now.after(Duration::from_millis(700)),
        }
    }

    /// The node where the guest runs.
    pub(crate) fn guest(&self) -> &Chassis {
        let current = self.migrations.last().map_or(0, Migration::guest);
        &self.chassis[current]
    }

    // === Kubernetes and the guest ===

    fn migrate(&mut self) {
        let Some(migration) = self.migrations.last_mut() else {
            return;
        };
        migration.stage = match migration.stage {
            Stage::Pending => Stage::TargetKnown,
            Stage::TargetKnown => Stage::TargetPlugged,
            Stage::TargetPlugged => Stage::Paused,
            Stage::Paused => Stage::Resumed,
            Stage::Resumed => Stage::Ended,
            Stage::Ended => Stage::OtherUnplugged,
            Stage::OtherUnplugged | Stage::OtherPodGone => Stage::OtherPodGone,
        };
        let (stage, target, left) = (migration.stage, migration.target, migration.left_behind());
        let names: Vec<_> = self.north.ports.keys().cloned().collect();
        for name in names {
            if stage == Stage::TargetPlugged {
                self.plugged.insert((name, target));
            } else if stage == Stage::OtherUnplugged {
                self.plugged.remove(&(name, left));
            }
        }
    }

    fn fail(&mut self) {
        let migration = self.migrations.last_mut();
        if let Some(migration) = migration.filter(|migration| migration.stage < Stage::Resumed) {
            migration.fails = true;
        }
    }

    fn next_migration(&mut self, target: usize) {
        let Some(last) = self.migrations.last() else {
            return;
        };
        let source = last.guest();
        if last.is_over() && target != source {
            // KubeVirt starts no migration before the last one is over; what that one left
            // behind may still be there.
            self.plugged.retain(|(_, node)| *node == source);
            self.migrations.push(Migration {
                number: last.number + 1,
                source,
                target,
                stage: Stage::Pending,
                fails: false,
            });
        }
    }

    // === OVN ===

    fn northd(&mut self) {
        self.south.nb_cfg = self.north.nb_cfg;
        self.south.requested = self
            .north
            .ports
            .iter()
            .map(|(name, config)| {
                let list = config.requested_chassis.as_deref().unwrap_or_default();
                let list = list.split(',').filter(|text| !text.is_empty());
                (name.clone(), list.map(str::to_owned).collect())
            })
            .collect();
    }

    fn ovn_controller(&mut self, node: usize) {
        let me = &self.chassis[node];
        for (port, binding) in &mut self.south.bindings {
            let requested = self
                .south
                .requested
                .get(port)
                .map_or(&[][..], Vec::as_slice);
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
            if additional {
                binding.additional.push(me.name.clone());
            }
        }
        self.south
            .applied
            .insert(me.name.clone(), self.south.nb_cfg);
    }

    fn ovn_settles(&mut self) {
        // Releases first on one round, claims on the next.
        for _ in 0..2 {
            self.northd();
            for node in 0..self.chassis.len() {
                self.ovn_controller(node);
            }
        }
    }

    // === The controller ===

    fn see_ovn(&mut self) {
        self.controller.north = self.north.clone();
        self.controller.south = self.south.clone();
    }

    fn restart(&mut self) {
        self.controller.migrations = self.migrations.clone();
        self.controller.since.clear();
        self.see_ovn();
    }

    /// Lets the controller decide for each migration it knows, all on the same observation, and, if
    /// `in_effect`, make the newest one's write: it looks again after every write. Returns the
    /// decisions, the oldest migration's first.
    pub(crate) fn act(&mut self, in_effect: bool) -> Vec<Decision> {
        let newest_first = self.controller.migrations.iter().rev().cloned();
        let mut newer_migration = false;
        let mut decisions = Vec::new();
        for migration in newest_first.collect::<Vec<_>>() {
            let observed = self.observe(&migration, newer_migration);
            newer_migration |= migration.takes_over();
            let decision = decide(&observed);
            check_idempotence(&observed, &decision);
            decisions.push((migration, decision));
        }
        let first = decisions
            .iter()
            .find_map(|(migration, decision)| Some((migration, decision.write.as_ref()?)));
        if let Some((migration, write)) = first
            && in_effect
        {
            self.execute(migration, write);
        }
        let oldest_first = decisions.into_iter().rev();
        oldest_first.map(|(_, decision)| decision).collect()
    }

    fn observe(&mut self, migration: &Migration, newer_migration: bool) -> Observed {
        let now = self.now;
        let since = self.controller.since.entry(migration.number).or_default();
        if migration.is_over() && since.outcome.is_none() {
            since.outcome = Some(now);
        }
        let known = migration.stage >= Stage::TargetKnown;
        let pod_gone = migration.stage == Stage::OtherPodGone;
        let (north, south) = (&self.controller.north, &self.controller.south);
        Observed {
            now,
            identity: Identity {
                migration: MigrationUid::new(format!("m-{}", migration.number)),
                epoch: Epoch(migration.number),
            },
            newer_migration,
            outcome: migration.outcome(),
            source: Some(self.chassis[migration.source].clone()),
            target: known.then(|| self.chassis[migration.target].clone()),
            former: self
                .controller
                .migrations
                .iter()
                .filter(|other| other.number < migration.number && !other.fails)
                .map(|other| self.chassis[other.source].clone())
                .collect(),
            source_pod_gone: pod_gone && !migration.fails,
            target_pod_gone: pod_gone && migration.fails,
            signals: signals(migration, now),
            ports: north
                .ports
                .iter()
                .map(|(name, config)| Port {
                    name: name.clone(),
                    config: config.clone(),
                    binding: south.bindings.get(name).cloned().unwrap_or_default(),
                })
                .collect(),
            routes: north
                .routes
                .iter()
                .map(|(key, leads_to)| Route {
                    key: key.clone(),
                    leads_to: leads_to.clone(),
                })
                .collect(),
            gateways: self.gateways.clone(),
            flip: self.flip,
            barrier: Barrier {
                nb_cfg: north.nb_cfg,
                applied: south.applied.clone(),
            },
            since: *since,
            deadlines: Deadlines::default(),
        }
    }

    /// Makes a write, twice: a transaction whose answer was lost with the connection may be.
    fn execute(&mut self, migration: &Migration, write: &Write) {
        let Some(after) = self.north.with(write) else {
            return;
        };
        self.check_fencing(migration, write);
        let step = write.step;
        for write in write.ports.iter().filter(|_| step != Step::Flip) {
            self.check_reach(&write.config);
        }
        for route in &write.routes {
            self.check_flip(route);
        }
        assert!(
            after.with(write).is_none_or(|twice| twice == after),
            "a write that was made must be refused the second time, or change nothing"
        );
        self.north = after;
        if write.raise_nb_cfg_from.is_some() {
            let since = self.controller.since.entry(migration.number).or_default();
            since.barrier = Some(self.now);
        }
        self.controller.north = self.north.clone();
    }

    // === What must hold at every step ===

    /// A write never asks for a place where the guest is not, as long as the controller has heard
    /// that the current migration took over: how far that one has come since, it may well not know.
    fn check_reach(&self, config: &PortConfig) {
        if !self.has_heard() {
            return;
        }
        let Some(requested) = config.requested_chassis.as_deref() else {
            return;
        };
        let guest = self.guest();
        assert!(
            requested.is_empty() || requested.split(',').any(|text| guest.is_named_by(text)),
            "a write requests {requested:?} while the guest runs on {guest}"
        );
    }

    /// Routes lead to where the guest is, or, on the pause where the policy says so, to where it is
    /// about to be. One that led nowhere may be placed by what the controller knew last.
    fn check_flip(&self, write: &RouteWrite) {
        let Some(current) = self.migrations.last().filter(|_| self.has_heard()) else {
            return;
        };
        let ahead = self.flip.timing == FlipTiming::OnPause && current.stage >= Stage::Paused;
        let target = &self.chassis[current.target].name;
        assert!(
            write.to.as_ref() == Some(&self.guest().name)
                || write.from.is_empty()
                || (ahead && write.to.as_ref() == Some(target)),
            "{write:?} while the guest runs on {} in {current:?}",
            self.guest()
        );
    }

    /// Whether the controller knows which migration is the current one, and that it took over.
    fn has_heard(&self) -> bool {
        let heard = |migration: Option<&Migration>| {
            migration.map(|migration| (migration.number, migration.takes_over()))
        };
        heard(self.controller.migrations.last()) == heard(self.migrations.last())
    }

    fn check_fencing(&self, migration: &Migration, write: &Write) {
        for write in &write.ports {
            let mark = self.north.ports[&write.port].mark.as_ref();
            assert!(
                mark.is_none_or(|mark| mark.epoch.0 <= migration.number),
                "migration {} wrote over {mark:?}",
                migration.number
            );
        }
    }

    // === The end ===

    /// Every route leads where the guest runs, and there alone, if a route can lead there.
    pub(crate) fn routes_follow(&self) -> Result<(), TestCaseError> {
        let guest = &self.guest().name;
        let only = BTreeSet::from([guest.clone()]);
        for (key, leads_to) in &self.north.routes {
            prop_assert!(
                *leads_to == only || !self.gateways.contains(guest),
                "{} leads to {:?}, the guest runs on {}",
                key,
                leads_to,
                guest
            );
        }
        Ok(())
    }

    /// Lets everything that can happen still happen: the last migration ends (and, unless it
    /// `lingers`, what it left behind goes), OVN and the caches catch up, the controller acts until
    /// it has nothing to write. Returns the last decisions.
    pub(crate) fn come_to_rest(&mut self, lingers: bool) -> Vec<Decision> {
        let end = if lingers {
            Stage::Ended
        } else {
            Stage::OtherPodGone
        };
        while self.migrations.last().is_some_and(|last| last.stage < end) {
            self.migrate();
        }
        for _ in 0..30 {
            self.ovn_settles();
            self.controller.migrations = self.migrations.clone();
            self.see_ovn();
            let decisions = self.act(true);
            let at_rest = decisions.iter().all(|decision| decision.write.is_none());
            let waits = decisions
                .iter()
                .any(|decision| decision.wake_at.is_some_and(|at| at > self.now));
            self.now = self.now.after(Duration::from_secs(40));
            if at_rest && !waits {
                return decisions;
            }
        }
        unreachable!("the controller never comes to rest: {:?}", self.north);
    }
}

fn signals(migration: &Migration, now: Timestamp) -> Signals {
    let seen = match migration.stage {
        Stage::Paused => Some((SignalKind::Paused, SignalSource::Libvirt)),
        Stage::Resumed if migration.fails => {
            Some((SignalKind::ResumedOnSource, SignalSource::Libvirt))
        }
        Stage::Resumed => Some((SignalKind::ResumedOnTarget, SignalSource::Activation)),
        _ => None,
    };
    seen.into_iter()
        .map(|(kind, source)| Signal {
            kind,
            source,
            at: now,
        })
        .collect()
}

/// The same observation with the write in effect must not ask for that write again.
fn check_idempotence(observed: &Observed, decision: &Decision) {
    let Some(write) = &decision.write else {
        return;
    };
    assert!(!write.ports.is_empty(), "an empty write: {decision:?}");
    assert_eq!(write.step == Step::Flip, !write.routes.is_empty());
    let mut after = observed.clone();
    for port in &mut after.ports {
        if let Some(write) = write.ports.iter().find(|write| write.port == port.name) {
            if decision.write.as_ref().map(|write| write.step) == Some(Step::Flip) {
                assert_eq!(port.config, write.config, "a flip's ports are guards");
            } else {
                assert_ne!(port.config, write.config, "a write that changes nothing");
            }
            port.config = write.config.clone();
        }
    }
    for route in &mut after.routes {
        if let Some(write) = write.routes.iter().find(|write| write.route == route.key) {
            let to: BTreeSet<_> = write.to.iter().cloned().collect();
            assert_ne!(route.leads_to, to, "a write that changes nothing");
            route.leads_to = to;
        }
    }
    if write.raise_nb_cfg_from.is_some() {
        after.barrier.nb_cfg += 1;
    }
    let again = decide(&after).write;
    assert_ne!(
        again.as_ref().map(|write| write.step),
        Some(write.step),
        "the step repeats itself"
    );
}
