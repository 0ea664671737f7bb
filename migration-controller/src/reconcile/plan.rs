//! Which handovers of a VM there are to look at.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use handover::{
    Chassis, Decision, Earlier, Epoch, Mark, Newer, Outcome, Phase, Side, VmName, has_moved,
};

use super::Looked;
use super::record::Record;
use crate::api::{Handover, VmReference};
use crate::cluster::VmObjects;
use crate::kubevirt::{MigrationEnd, VirtualMachineInstanceMigration};
use crate::observe::Ending;
use crate::ovn::{PortRow, read_config};

/// The UIDs of all migrations whose marks the VM's ports may bear.
pub(super) fn migrations(
    objects: &VmObjects,
    records: &BTreeMap<String, Record>,
) -> BTreeSet<String> {
    let migrations = objects.migrations.iter();
    let handovers = objects.handovers.iter();
    migrations
        .filter_map(|migration| migration.metadata.uid.clone())
        .chain(handovers.map(|handover| handover.spec.migration.uid.clone()))
        .chain(records.keys().cloned())
        .collect()
}

/// Puts a record for every handover into `records`, leaving those that are in it as they are:
/// for each migration, for each Handover whose migration is gone, and for each mark of which neither
/// is left.
pub(super) fn load(
    vm: &VmName,
    objects: &VmObjects,
    ports: &[PortRow],
    unsaved: &BTreeMap<String, Record>,
    chassis_of: &dyn Fn(&str) -> Option<Chassis>,
    records: &mut BTreeMap<String, Record>,
) {
    let marks: Vec<_> = ports
        .iter()
        .filter_map(|row| read_config(row).ok()?.mark)
        .collect();
    refresh(objects, unsaved, records);
    let mut known: Vec<_> = objects
        .handovers
        .iter()
        .map(|handover| handover.spec.epoch())
        .chain(records.values().map(|record| record.spec.epoch()))
        .chain(marks.iter().map(|mark| mark.epoch))
        .collect();
    for migration in &objects.migrations {
        let Some(uid) = migration.metadata.uid.clone() else {
            continue;
        };
        if !records.contains_key(&uid) && is_candidate(objects, migration, &uid, &marks) {
            let record = begin(vm, objects, migration, uid, &marks, &mut known);
            records.insert(record.uid().to_owned(), record);
        }
    }
    let here = objects.vmi.as_ref().and_then(|vmi| {
        let node = vmi.node_name()?;
        Some((node.to_owned(), chassis_of(node)?.name))
    });
    let here = here
        .as_ref()
        .map(|(node, chassis)| (node.as_str(), chassis.as_str()));
    for mark in &marks {
        let uid = mark.migration.as_str();
        if !records.contains_key(uid) {
            let orphan = unsaved.get(uid).cloned();
            let fresh = || Record::of_orphan(mark, &vm.namespace, vm.name.clone(), here);
            records.insert(uid.to_owned(), orphan.unwrap_or_else(fresh));
        }
    }
}

/// Takes in what Kubernetes has of each record now, without losing what was learned since.
pub(super) fn refresh(
    objects: &VmObjects,
    unsaved: &BTreeMap<String, Record>,
    records: &mut BTreeMap<String, Record>,
) {
    let migration = |uid: &str| {
        let migrations = objects.migrations.iter();
        migrations
            .into_iter()
            .find(|migration| migration.metadata.uid.as_deref() == Some(uid))
    };
    for handover in &objects.handovers {
        let uid = &handover.spec.migration.uid;
        let known = records.remove(uid).or_else(|| unsaved.get(uid).cloned());
        let record = match known {
            Some(known) => Record {
                stored: Some(handover.clone()),
                migration: migration(uid).cloned(),
                ..known
            },
            None => Record::of(handover, migration(uid)),
        };
        records.insert(uid.clone(), record);
    }
    for migration in &objects.migrations {
        let Some(uid) = &migration.metadata.uid else {
            continue;
        };
        let stored = objects
            .handovers
            .iter()
            .any(|handover| handover.spec.migration.uid == *uid);
        if !stored && let Some(known) = records.remove(uid).or_else(|| unsaved.get(uid).cloned()) {
            let record = Record {
                stored: None,
                migration: Some(migration.clone()),
                ..known
            };
            records.insert(uid.clone(), record);
        }
    }
}

/// Whether a migration without a record may need one: it is under way, or over so lately that it is
/// the VM's last, or its marks are still about.
fn is_candidate(
    objects: &VmObjects,
    migration: &VirtualMachineInstanceMigration,
    uid: &str,
    marks: &[Mark],
) -> bool {
    let last = objects.migrations.last();
    let is_last = last.is_some_and(|last| last.metadata.uid.as_deref() == Some(uid));
    let vmi = objects.vmi.as_ref();
    let told = vmi.is_some_and(|vmi| vmi.migration_state(uid).is_some());
    migration.end().is_none()
        || (is_last && told)
        || marks.iter().any(|mark| mark.migration.as_str() == uid)
}

/// The record of a migration that has none. Its epoch is the one its marks bear, if it left any: the
/// Handover was deleted, or never written.
fn begin(
    vm: &VmName,
    objects: &VmObjects,
    migration: &Arc<VirtualMachineInstanceMigration>,
    uid: String,
    marks: &[Mark],
    known: &mut Vec<Epoch>,
) -> Record {
    let own = marks.iter().find(|mark| mark.migration.as_str() == uid);
    let created = migration.metadata.creation_timestamp.as_ref();
    let created = created.and_then(|created| u64::try_from(created.0.as_second()).ok());
    let next = || Epoch::next(created.unwrap_or_default(), known.iter().copied());
    let epoch = own.map_or_else(next, |mark| mark.epoch);
    known.push(epoch);
    let reference = VmReference {
        name: vm.name.clone(),
        uid: objects
            .vmi
            .as_ref()
            .and_then(|vmi| vmi.metadata.uid.clone()),
    };
    Record::new(
        migration,
        reference,
        uid,
        i64::try_from(epoch.0).unwrap_or(i64::MAX),
    )
}

/// The chassis that the VM's migrations before this one left.
pub(super) fn former(
    record: &Record,
    objects: &VmObjects,
    chassis_of: &dyn Fn(&str) -> Option<Chassis>,
) -> Vec<Chassis> {
    let older = |handover: &&Arc<Handover>| {
        let phase = handover.status.as_ref().map(|status| status.phase);
        handover.spec.epoch < record.spec.epoch && phase == Some(Phase::Succeeded)
    };
    let recorded = objects.handovers.iter().filter(older);
    let recorded = recorded.filter_map(|handover| handover.spec.source.as_ref()?.chassis());
    let earlier = objects
        .migrations
        .iter()
        .take_while(|migration| migration.metadata.uid.as_deref() != Some(record.uid()));
    let told = earlier.filter_map(|migration| {
        let succeeded = migration.end() == Some(MigrationEnd::Succeeded);
        let state = migration.status.as_ref()?.migration_state.as_ref()?;
        let node = state.source_node.as_deref().filter(|_| succeeded)?;
        chassis_of(node)
    });
    let left: BTreeSet<_> = recorded.chain(told).collect();
    left.into_iter().collect()
}

/// Puts what was observed of a VM's handovers, the newest first, into relation.
pub(super) fn order(looked: &mut [Looked]) {
    let mut newer = Newer::default();
    for position in 0..looked.len() {
        let (_, older) = looked.split_at(position + 1);
        let earlier = earlier(older);
        let observed = &mut looked[position].seen.observed;
        // Whoever gives ports back once the guest is gone gives back their own.
        if observed.outcome != Outcome::GuestGone {
            observed.newer = newer;
        }
        observed.earlier = earlier;
        newer.note(observed);
    }
}

/// What the migrations before another one have come to, the newest first.
fn earlier(older: &[Looked]) -> Earlier {
    let is_under_way = |looked: &Looked| {
        let observed = &looked.seen.observed;
        let begun = observed.target.is_some() || has_moved(observed);
        observed.outcome == Outcome::Running && begun && !looked.before.is_final()
    };
    let succeeded = |looked: &&Looked| looked.seen.ending == Ending::On(Side::Target);
    let last = older.iter().find(succeeded);
    Earlier {
        under_way: older.iter().any(is_under_way),
        left_guest_on: last.and_then(|looked| looked.seen.observed.target.clone()),
    }
}

/// Whether a handover that was over has something to do after all.
///
/// It has when a port bears a mark that it must answer for: its own, or, as the VM's newest, any
/// older one. And when it was rolled back, as the VM's newest, but the guest turns out to be on the
/// target: KubeVirt can call a migration failed whose guest has moved.
pub(super) fn reopens(looked: &Looked, newest: bool) -> bool {
    let Looked {
        before,
        record,
        seen,
    } = looked;
    let epoch = record.spec.epoch();
    let answers_for = |mark: &Mark| mark.epoch == epoch || (newest && mark.epoch < epoch);
    let marks = seen
        .observed
        .ports
        .iter()
        .filter_map(|port| port.config.mark.as_ref());
    let moved = *before == Phase::RolledBack && seen.ending == Ending::On(Side::Target);
    marks.into_iter().any(answers_for) || (newest && moved)
}

/// Whether a migration is worth a record: one that was over before it was first seen is history,
/// unless its ports still need something.
pub(super) fn is_worth_it(record: &Record, decision: &Decision) -> bool {
    let over = record
        .migration
        .as_ref()
        .is_some_and(|migration| migration.end().is_some());
    let fresh = record.stored.is_none() && record.status.phase_since.is_none();
    !(over && fresh && !record.orphan && decision.write.is_none())
}
