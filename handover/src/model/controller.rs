//! The controller: what it has heard, and what it makes of it.

use std::collections::BTreeMap;

use super::{Instance, Migration, Northbound, Southbound, Stage, World};
use crate::{
    Barrier, Deadlines, Decision, Earlier, Epoch, Identity, MigrationUid, Newer, Observed, Outcome,
    Port, Route, Side, Signal, SignalKind, SignalSource, Signals, Since, SourceWords, Step, Write,
    decide, source,
};

/// One running controller, and the records, which outlive it.
#[derive(Clone, Debug)]
pub(super) struct Controller {
    /// The migrations, and their target pods.
    migrations: Vec<Migration>,
    pub(super) instance: Instance,
    pub(super) north: Northbound,
    pub(super) south: Southbound,
    since: BTreeMap<u64, Since>,
    records: BTreeMap<u64, Record>,
    gone: bool,
}

#[derive(Clone, Debug, Default)]
struct Record {
    source: Option<usize>,
    begun: bool,
    signals: Signals,
}

impl Controller {
    pub(super) fn new(north: &Northbound) -> Self {
        Self {
            migrations: Vec::new(),
            instance: Instance {
                node: 0,
                about: None,
            },
            north: north.clone(),
            south: Southbound::default(),
            since: BTreeMap::new(),
            records: BTreeMap::new(),
            gone: false,
        }
    }

    /// KubeVirt's word about this very migration.
    fn told(&self, migration: &Migration) -> Option<&Migration> {
        let about = self.instance.about.as_ref();
        about.filter(|about| about.number == migration.number)
    }

    pub(super) fn knows(&self, migration: &Migration) -> bool {
        let mut known = self.migrations.iter();
        let known = known.rfind(|known| known.number == migration.number);
        known.is_some_and(|known| known.begun)
    }

    fn is_marked(&self, number: u64) -> bool {
        let ports = self.north.ports.values();
        let mut marks = ports.filter_map(|config| config.mark.as_ref());
        marks.any(|mark| mark.epoch.0 == number)
    }

    fn target(&self, migration: &Migration) -> Option<usize> {
        let told = self.told(migration).map(|told| told.target);
        let placed = migration.begun.then_some(migration.target);
        placed.or(told)
    }

    /// How the migration stands, and where the guest is if that is at neither end.
    fn ending(&self, migration: &Migration, source: Option<usize>) -> (Outcome, Option<usize>) {
        if self.gone {
            return (Outcome::GuestGone, None);
        }
        let told = self.told(migration);
        let mut words = [Some(migration), told].into_iter().flatten();
        let over = |word: &Migration| word.is_over() && !word.deleted;
        let succeeded = words.clone().any(|word| over(word) && !word.fails);
        let ended = words.any(over) || migration.deleted;
        let node = self.instance.node;
        let target = self.target(migration);
        match () {
            () if succeeded => (Outcome::GuestOn(Side::Target), None),
            () if !ended => (Outcome::Running, None),
            // What KubeVirt says of the instance can be from before this migration.
            () if target == Some(node) && !(told.is_some() || self.is_marked(migration.number)) => {
                (Outcome::GuestOn(Side::Source), None)
            }
            () if target == Some(node) => (Outcome::GuestOn(Side::Target), None),
            () if source == Some(node) => (Outcome::GuestOn(Side::Source), None),
            () => (Outcome::GuestOn(Side::Source), Some(node)),
        }
    }
}

impl World {
    pub(super) fn see_migrations(&mut self) {
        self.controller.migrations = self.migrations.clone();
        self.controller.gone = self.guest.is_none();
    }

    pub(super) fn see_ovn(&mut self) {
        self.controller.north = self.north.clone();
        self.controller.south = self.south.clone();
    }

    pub(super) fn restart(&mut self) {
        self.see_migrations();
        self.controller.instance = self.instance();
        self.controller.since.clear();
        self.see_ovn();
    }

    /// Whether the controller would have the target opened for a pause that it hears of now.
    pub(super) fn is_prepared(&self, number: u64) -> bool {
        let ports = self.controller.north.ports.values();
        let mut marks = ports.map(|config| config.mark.as_ref());
        marks.all(|mark| mark.is_some_and(|mark| mark.epoch.0 == number && mark.barrier.is_some()))
    }

    /// Lets the controller decide for each migration it knows, all on the same observation, and, if
    /// `in_effect`, make the newest one's write: it looks again after every write. Returns the
    /// decisions, the oldest migration's first.
    pub(super) fn act(&mut self, in_effect: bool) -> Vec<Decision> {
        let newest_first: Vec<_> = self.controller.migrations.iter().rev().cloned().collect();
        for migration in &newest_first {
            self.leaves_from(migration);
        }
        let mut newer = Newer::default();
        let mut decisions = Vec::new();
        for migration in newest_first {
            let observed = self.observe(&migration, newer);
            newer.note(&observed);
            let decision = decide(&observed);
            super::checks::idempotence(&observed, &decision);
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

    fn leaves_from(&mut self, migration: &Migration) -> Option<usize> {
        let told = self.controller.told(migration).map(|told| told.source);
        let marked = self.controller.is_marked(migration.number);
        let now = self.controller.instance.node;
        let record = self.controller.records.entry(migration.number).or_default();
        record.begun |= marked;
        record.source = source(SourceWords {
            told,
            now: (!migration.is_over()).then_some(now),
            recorded: record.source,
            begun: record.begun,
        });
        record.source
    }

    fn observe(&mut self, migration: &Migration, newer: Newer) -> Observed {
        let now = self.now;
        let source = self.leaves_from(migration);
        let (outcome, elsewhere) = self.controller.ending(migration, source);
        let since = self.controller.since.entry(migration.number).or_default();
        if outcome != Outcome::Running && since.outcome.is_none() {
            since.outcome = Some(now);
        }
        let since = *since;
        self.hear(migration, outcome);
        let earlier = self.earlier(migration);
        let known = &self.controller;
        let target = known.target(migration);
        // The pod's node is a fact; where the guest is can be old news.
        let source = source.filter(|_| target != source);
        let (source, target) = match elsewhere {
            None => (source, target),
            // What moved nothing has its guest wherever that is; what did has it follow.
            Some(node) if known.is_marked(migration.number) => (source, Some(node)),
            Some(node) => (Some(node), None),
        };
        let outcome = match elsewhere {
            Some(_) if target.is_some() => Outcome::GuestOn(Side::Target),
            _ => outcome,
        };
        let at = |node: Option<usize>| node.map(|node| self.chassis[node].clone());
        let pod_gone = migration.stage == Stage::OtherPodGone;
        let (north, south) = (&known.north, &known.south);
        Observed {
            now,
            identity: Identity {
                migration: MigrationUid::new(format!("m-{}", migration.number)),
                epoch: Epoch(migration.number),
            },
            newer,
            earlier,
            is_named: known.told(migration).is_some(),
            outcome,
            source: at(source),
            target: at(target),
            former: known
                .migrations
                .iter()
                .filter(|other| other.number < migration.number && other.begun && !other.fails)
                .filter(|other| other.is_over())
                .map(|other| self.chassis[other.source].clone())
                .collect(),
            source_pod_gone: pod_gone && !migration.fails,
            target_pod_gone: pod_gone && migration.fails,
            signals: known.records[&migration.number].signals.clone(),
            ports: north
                .ports
                .iter()
                .map(|(name, config)| Port {
                    name: name.clone(),
                    config: config.clone(),
                    binding: south.bindings.get(name).cloned().unwrap_or_default(),
                    activated: south.activated.get(name).cloned().unwrap_or_default(),
                    announces: true,
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
            since,
            deadlines: Deadlines::default(),
        }
    }

    fn earlier(&self, migration: &Migration) -> Earlier {
        let known = &self.controller;
        let older = || {
            let all = known.migrations.iter();
            all.filter(|other| other.number < migration.number)
        };
        let outcome = |other: &Migration| {
            let source = known.records.get(&other.number)?.source;
            Some(known.ending(other, source).0)
        };
        let under_way = |other: &&Migration| {
            outcome(other) == Some(Outcome::Running)
                && (known.is_marked(other.number) || known.target(other).is_some())
        };
        let succeeded = |other: &&Migration| outcome(other) == Some(Outcome::GuestOn(Side::Target));
        let last = older().rfind(succeeded);
        let took_it_to = last.and_then(|other| known.target(other));
        Earlier {
            under_way: older().any(|other| under_way(&other)),
            left_guest_on: took_it_to.map(|node| self.chassis[node].clone()),
        }
    }

    /// Takes note of the signs that are there.
    fn hear(&mut self, migration: &Migration, outcome: Outcome) {
        let mut seen = Vec::new();
        let number = migration.number;
        let told = self.controller.told(migration);
        let target = self.controller.target(migration);
        let target = target.map(|node| self.chassis[node].name.clone());
        // Agents tell at once, of what they are armed for.
        let real = self.migrations.iter().find(|real| real.number == number);
        let marked = self.controller.is_marked(number);
        if let Some(real) = real.filter(|_| self.agents && marked) {
            seen.extend(by_agents(real));
        }
        let is_open = |name: &String| {
            let south = &self.controller.south;
            let mut ports = south.activated.iter();
            ports.any(|(port, activated)| {
                activated.contains(name) && south.bindings[port].additional.contains(name)
            })
        };
        let opened = real.is_some_and(|real| real.opened);
        if self.is_passed(number, target.as_ref())
            && !opened
            && target.as_ref().is_some_and(is_open)
        {
            seen.push((SignalKind::ResumedOnTarget, SignalSource::Activation));
        }
        let runs = |told: &Migration| told.stage >= Stage::Confirmed && !told.fails;
        if told.is_some_and(runs) {
            seen.push((SignalKind::ResumedOnTarget, SignalSource::DomainReady));
        }
        if outcome == Outcome::GuestOn(Side::Target) {
            seen.push((SignalKind::ResumedOnTarget, SignalSource::MigrationEnd));
        }
        let at = self.now;
        let record = self.controller.records.entry(number).or_default();
        let left = record.signals.guest() != crate::GuestPlace::Source;
        if outcome == Outcome::GuestOn(Side::Source) && left {
            seen.push((SignalKind::ResumedOnSource, SignalSource::MigrationEnd));
        }
        for (kind, source) in seen {
            let known = |signal: &&Signal| (signal.kind, signal.source) == (kind, source);
            if record.signals.iter().any(|signal| known(&signal)) {
                continue;
            }
            record.signals.note(Signal { kind, source, at });
        }
    }

    /// Whether the target has made of the Northbound what was written for a migration.
    fn is_passed(&self, number: u64, target: Option<&String>) -> bool {
        let known = &self.controller;
        let applied = target.and_then(|target| known.south.applied.get(target));
        known.north.ports.values().any(|config| {
            let mark = config.mark.as_ref().filter(|mark| mark.epoch.0 == number);
            let barrier = mark.and_then(|mark| mark.barrier);
            barrier.is_some_and(|barrier| applied >= Some(&barrier))
        })
    }

    /// Makes a write, twice: a transaction whose answer was lost with the connection may be.
    fn execute(&mut self, migration: &Migration, write: &Write) {
        let Some(after) = self.north.with(write) else {
            return;
        };
        self.check(migration, write);
        assert!(
            after.with(write).is_none_or(|twice| twice == after),
            "a write that was made must be refused the second time, or change nothing"
        );
        self.north = after;
        if write.step == Step::RaiseBarrier {
            let since = self.controller.since.entry(migration.number).or_default();
            since.barrier = Some(self.now);
        }
        self.controller.north = self.north.clone();
    }

    /// Whether the controller knows which migration is the current one.
    pub(super) fn has_heard(&self) -> bool {
        let mut migrations = self.migrations.iter();
        let last = migrations.rfind(|migration| migration.begun);
        last.is_none_or(|last| self.controller.knows(last))
    }

    /// Whether what the controller last read of the instance is what it says.
    pub(super) fn sees_instance(&self) -> bool {
        let said = |instance: &Instance| {
            let about = instance.about.as_ref();
            (instance.node, about.map(|about| about.number))
        };
        said(&self.controller.instance) == said(&self.instance())
    }
}

fn by_agents(real: &Migration) -> Vec<(SignalKind, SignalSource)> {
    let mut seen = Vec::new();
    if real.begun && real.stage >= Stage::Paused {
        seen.push((SignalKind::Paused, SignalSource::Libvirt));
    }
    if real.begun && real.stage >= Stage::Resumed {
        seen.push(if real.fails {
            (SignalKind::ResumedOnSource, SignalSource::Libvirt)
        } else {
            (SignalKind::ResumedOnTarget, SignalSource::Rarp)
        });
    }
    seen
}
