//! Two ports that are one: where a network has a port for every pod, a guest that moves gets another.
//!
//! The decisions know of one port that two chassis have. A *pair* is shown to them as that, and what
//! they decide is translated:
//!
//! | shown | the rows |
//! | --- | --- |
//! | `requested-chassis=S,T` | both ports exist, each on its node's switch |
//! | bound to S, additionally to T | the source's port is bound to S, T has claimed the target's |
//! | `requested-chassis=T` alone | the source's port is gone, the target's asks for T alone |
//! | `requested-chassis=S` alone | the target's port is gone |
//!
//! The mark is on both, so that either can tell of it when the other has gone. The target's port is a
//! copy of the source's, in all of its port groups from the transaction on that makes it: there is no
//! moment at which a policy does not hold. It asks for S and T, although S has no interface for it:
//! only a chassis that is additional heeds the activation strategy, so only that way T keeps the port
//! shut until the guest announces itself, and tells of it. Where the network's owner has made it already, it is taken
//! as it is, and labelled with the VM from then on; one that its owner labels so itself, ahead of
//! that, would be taken for another port of the VM's.

use std::collections::{BTreeMap, BTreeSet};

use handover::{Mark, PortConfig, PortName, VmName};
use ovsdb_rs::{Condition, Datum, Mutation, Row, Transaction};
use uuid::Uuid;

use super::PortRow;
use super::writer::{ACTIVATION_STRATEGY, Mismatch, REQUESTED_CHASSIS, guard, map, mutations};
use crate::routed::port_addresses;

/// Key of `external_ids` of the target's port: the name of the source's.
const SOURCE_PORT: &str = "segue.io/source-port";
/// Key of `external_ids` of the target's port: segue made it, and may remove it.
const CREATED: &str = "segue.io/created";
/// Key of `external_ids`: whose port it is.
const VM: &str = "segue.io/vm";
/// Key of `external_ids` of the source's port: what the target's is called, where that does not
/// follow from the names of the pods.
const TARGET_PORT: &str = "segue.io/target-port";
/// Keys of `options` that say nothing of the target's port: which of the source node's interfaces is
/// the source pod's, and a number that one port has. Source: ovn-nb(5).
const OWN_OPTIONS: [&str; 3] = ["iface-id-ver", "requested-tnl-key", ACTIVATION_STRATEGY];
/// Columns of the source's port that say nothing of the target's. Source: ovn-nb(5).
const OWN_COLUMNS: [&str; 6] = [
    "_uuid",
    "_version",
    "name",
    "up",
    "dynamic_addresses",
    "ha_chassis_group",
];

/// One port of a VM as the decisions see it: a row, or two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    name: PortName,
    source: Option<PortRow>,
    target: Option<PortRow>,
}

/// The ports of a VM, those of a pair together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pairs(Vec<Pair>);

/// Where the target's port of a pair is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Whose port it is.
    pub(crate) vm: VmName,
    /// The pods of the guest before and after.
    pub(crate) pods: (String, String),
    /// The switch of the target's node.
    pub(crate) switch: Uuid,
}

/// What is read of the source's port just before the target's is made.
#[derive(Clone, Debug)]
pub(super) struct Original {
    /// All of its columns.
    pub(super) row: Row,
    /// The port groups that it is in, by UUID, with their names.
    pub(super) groups: Vec<(Uuid, String)>,
    /// The port that is called as the target's is to be, where there is one already.
    pub(super) present: Option<Present>,
}

/// A port that may have been made for the target's pod.
#[derive(Clone, Debug)]
pub(super) struct Present {
    /// Its row.
    pub(super) uuid: Uuid,
    /// The routed switch that it is on.
    pub(super) switch: Option<Uuid>,
    /// Its `addresses`.
    pub(super) addresses: Vec<String>,
    /// Its `options`.
    pub(super) options: BTreeMap<String, String>,
    /// Its `external_ids`.
    pub(super) external_ids: BTreeMap<String, String>,
}

/// What the target's port is to be made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Making<'a> {
    /// The port on the chassis that the guest leaves.
    pub(super) source: &'a PortRow,
    /// The source is what an earlier handover had as its target, and is nobody's counterpart now.
    promoted: bool,
    /// The other port of the pair that there is: of a target that is none any more, or of a source
    /// that an earlier handover left.
    stale: Option<&'a PortRow>,
}

/// Which switch a port is on.
pub(super) type SwitchOf<'a> = &'a dyn Fn(&Uuid) -> Option<Uuid>;

// === impl Pairs ===

impl Pairs {
    pub(crate) fn of(rows: &[PortRow]) -> Self {
        let mut pairs: BTreeMap<PortName, Pair> = BTreeMap::new();
        for row in rows {
            let source = row.external_ids.get(SOURCE_PORT).map(PortName::new);
            let is_target = source.is_some();
            let name = source.unwrap_or_else(|| row.name.clone());
            let pair = pairs.entry(name.clone()).or_insert_with(|| Pair {
                name,
                source: None,
                target: None,
            });
            let half = if is_target {
                &mut pair.target
            } else {
                &mut pair.source
            };
            *half = Some(row.clone());
        }
        Self(pairs.into_values().collect())
    }

    /// The pair of this name.
    pub(super) fn get(&self, name: &PortName) -> Option<&Pair> {
        self.0.iter().find(|pair| pair.name == *name)
    }
}

/// Whether a row is the target's port of a pair.
pub(crate) fn is_counterpart(row: &PortRow) -> bool {
    row.external_ids.contains_key(SOURCE_PORT)
}

/// The rows of a VM as the decisions see them: every pair as one.
pub(crate) fn shown(rows: &[PortRow]) -> Vec<PortRow> {
    Pairs::of(rows).0.iter().filter_map(Pair::shown).collect()
}

/// The rows of a VM's ports by the names that the decisions have for them: those that are for where
/// the guest leaves, and those that are for where it goes.
pub(crate) fn ends(rows: &[PortRow]) -> Vec<(PortName, PortRow, PortRow)> {
    let ends = |pair: &Pair| {
        let source = pair.source.as_ref().or(pair.target.as_ref())?;
        let target = pair.target.as_ref().or(pair.source.as_ref())?;
        Some((pair.name.clone(), source.clone(), target.clone()))
    };
    Pairs::of(rows).0.iter().filter_map(ends).collect()
}

// === impl Pair ===

impl Pair {
    fn shown(&self) -> Option<PortRow> {
        let (source, target) = match (&self.source, &self.target) {
            (Some(source), Some(target)) => (source, target),
            (None, Some(only)) | (Some(only), None) => {
                return Some(PortRow {
                    name: self.name.clone(),
                    ..only.clone()
                });
            }
            (None, None) => return None,
        };
        let mut row = source.clone();
        match Mark::from_external_ids(&target.external_ids) {
            Ok(Some(mark)) => {
                let both = format!("{},{}", mark.source, mark.target);
                row.options.insert(REQUESTED_CHASSIS.to_owned(), both);
            }
            Ok(None) => {}
            // Damage to either is damage to both.
            Err(_) => row.external_ids.clone_from(&target.external_ids),
        }
        match target.options.get(ACTIVATION_STRATEGY) {
            Some(strategy) => row
                .options
                .insert(ACTIVATION_STRATEGY.to_owned(), strategy.clone()),
            None => row.options.remove(ACTIVATION_STRATEGY),
        };
        let additional = target.binding.additional.iter();
        let claimed = target.binding.chassis.iter().chain(additional);
        row.binding.additional = claimed.cloned().collect();
        row.activated.extend(target.activated.iter().cloned());
        Some(row)
    }

    /// What the target's port that `config` asks for is to be made of; nothing where there is such a
    /// port, or none is needed.
    pub(super) fn to_make(
        &self,
        config: &PortConfig,
        target: &Target,
        switch_of: SwitchOf<'_>,
    ) -> Option<Making<'_>> {
        let making = self.making(config)?;
        let here = switch_of(&making.source.uuid)?;
        // One switch has both nodes: the port can be on both.
        let needed = here != target.switch;
        (needed && !making.is_paired(config, Some(target), switch_of)).then_some(making)
    }

    /// The rows by what they are to a handover that is to have two chassis.
    fn making(&self, config: &PortConfig) -> Option<Making<'_>> {
        let mark = config.mark.as_ref().filter(|_| wants_both(config))?;
        match (&self.source, &self.target) {
            (stale, Some(target)) if target_of(target).as_ref() == Some(&mark.source) => {
                Some(Making {
                    source: target,
                    promoted: true,
                    stale: stale.as_ref(),
                })
            }
            (Some(source), stale) => Some(Making {
                source,
                promoted: false,
                stale: stale.as_ref(),
            }),
            (None, _) => None,
        }
    }

    fn expect(&self, tx: &mut Transaction) {
        for row in self.source.iter().chain(&self.target) {
            tx.expect("Logical_Switch_Port", row.uuid, guard(row));
        }
    }

    /// Adds what makes the rows look like `config` when shown, for a pair that is one or was.
    pub(super) fn change(
        &self,
        config: &PortConfig,
        target: Option<&Target>,
        switch_of: SwitchOf<'_>,
        tx: &mut Transaction,
    ) -> Result<(), Mismatch> {
        self.expect(tx);
        if let Some(making) = self.making(config)
            && !making.is_paired(config, target, switch_of)
        {
            // Nothing says where a counterpart would be: the port itself is to be on both chassis.
            making.clear(switch_of, tx)?;
            change_row(
                making.source,
                making.promote(mutations(making.source, config)),
                tx,
            );
            return Ok(());
        }
        let both = wants_both(config);
        match (&self.source, &self.target) {
            (Some(source), Some(target)) if both => {
                change_row(source, mark_alone(source, config), tx);
                let ours = target.external_ids.contains_key(CREATED);
                let requested = target.options.get(REQUESTED_CHASSIS).cloned();
                let requested = if ours {
                    config.requested_chassis.clone()
                } else {
                    requested
                };
                let config = PortConfig {
                    requested_chassis: requested,
                    ..config.clone()
                };
                change_row(target, mutations(target, &config), tx);
            }
            (Some(source), Some(target)) => {
                let to = target_of(target);
                if to.is_some() && config.requested_chassis == to {
                    remove(source, switch_of, tx)?;
                    change_row(target, mutations(target, config), tx);
                } else {
                    let_go(target, switch_of, tx)?;
                    change_row(source, mutations(source, config), tx);
                }
            }
            // The owner took the source's away, maybe before the flip.
            (None, Some(target)) => {
                let mut all = mutations(target, config);
                if config.mark.is_none() {
                    all.push(Mutation::delete_keys(
                        "external_ids",
                        [SOURCE_PORT, CREATED],
                    ));
                }
                change_row(target, all, tx);
            }
            (Some(source), None) => change_row(source, mutations(source, config), tx),
            (None, None) => return Err(Mismatch::Port(self.name.clone())),
        }
        Ok(())
    }
}

impl Making<'_> {
    /// Whether the other port of the pair is the target's that is wanted.
    fn is_paired(
        &self,
        config: &PortConfig,
        target: Option<&Target>,
        switch_of: SwitchOf<'_>,
    ) -> bool {
        let Some(row) = self.stale.filter(|_| !self.promoted) else {
            return false;
        };
        let Some(target) = target else {
            return target_of(row) == config.mark.as_ref().map(|mark| mark.target.clone());
        };
        let name = target.port_name(self.source).ok();
        let is_named = name.is_none_or(|name| name == row.name.as_str());
        is_named && switch_of(&row.uuid) == Some(target.switch)
    }

    /// Lets the other port of the pair go.
    fn clear(&self, switch_of: SwitchOf<'_>, tx: &mut Transaction) -> Result<(), Mismatch> {
        match self.stale {
            Some(left) if self.promoted => remove(left, switch_of, tx),
            Some(target) => let_go(target, switch_of, tx),
            None => Ok(()),
        }
    }

    /// Adds to changes of the source what makes it one.
    fn promote(&self, mut changes: Vec<Mutation>) -> Vec<Mutation> {
        if self.promoted {
            let keys = [SOURCE_PORT, CREATED];
            changes.push(Mutation::delete_keys("external_ids", keys));
        }
        changes
    }
}

/// The chassis that the mark of a target's port names.
fn target_of(row: &PortRow) -> Option<String> {
    let mark = Mark::from_external_ids(&row.external_ids).ok().flatten();
    mark.map(|mark| mark.target)
}

/// Whether a port is to be on two chassis.
pub(super) fn wants_both(config: &PortConfig) -> bool {
    let requested = config.requested_chassis.as_deref();
    requested.is_some_and(|list| list.contains(','))
}

/// The mark's part of what turns a row into `config`.
fn mark_alone(row: &PortRow, config: &PortConfig) -> Vec<Mutation> {
    let config = PortConfig {
        requested_chassis: row.options.get(REQUESTED_CHASSIS).cloned(),
        activation_strategy: row.options.get(ACTIVATION_STRATEGY).cloned(),
        mark: config.mark.clone(),
    };
    mutations(row, &config)
}

fn change_row(row: &PortRow, mutations: Vec<Mutation>, tx: &mut Transaction) {
    if !mutations.is_empty() {
        tx.mutate("Logical_Switch_Port", row.uuid, mutations);
    }
}

/// A port that no switch has is no more (ovn-nb(5): the table is not of the root set).
fn remove(row: &PortRow, switch_of: SwitchOf<'_>, tx: &mut Transaction) -> Result<(), Mismatch> {
    let switch = switch_of(&row.uuid).ok_or_else(|| Mismatch::Port(row.name.clone()))?;
    let gone = Datum::set([row.uuid]);
    let holds = [
        Condition::uuid(switch),
        Condition::includes("ports", gone.clone()),
    ];
    tx.mutate("Logical_Switch", holds, [Mutation::delete("ports", gone)]);
    Ok(())
}

/// Removes the target's port, or the marks from one that is somebody else's.
fn let_go(target: &PortRow, switch_of: SwitchOf<'_>, tx: &mut Transaction) -> Result<(), Mismatch> {
    if target.external_ids.contains_key(CREATED) {
        return remove(target, switch_of, tx);
    }
    let keys = Mark::KEYS.into_iter().chain([SOURCE_PORT, VM]);
    let mut gone = vec![Mutation::delete_keys("external_ids", keys)];
    if target.options.contains_key(ACTIVATION_STRATEGY) {
        gone.push(Mutation::delete_keys("options", [ACTIVATION_STRATEGY]));
    }
    change_row(target, gone, tx);
    Ok(())
}

// === Making the target's port ===

impl Target {
    /// What the target's port is called: as the source's says, or as that is with the pod's name.
    pub(super) fn port_name(&self, source: &PortRow) -> Result<String, Mismatch> {
        if let Some(told) = source.external_ids.get(TARGET_PORT) {
            return Ok(told.clone());
        }
        let (before, after) = &self.pods;
        let name = source.name.as_str();
        if before.is_empty() || after.is_empty() || !name.contains(before.as_str()) {
            return Err(Mismatch::Counterpart(source.name.clone()));
        }
        Ok(name.replacen(before.as_str(), after, 1))
    }

    /// The port that is there already as the target's, unless it cannot be that.
    fn present<'a>(
        &self,
        making: &Making<'_>,
        original: &'a Original,
    ) -> Result<Option<&'a Present>, Mismatch> {
        let is_going = |present: &&Present| {
            let going = making.stale.filter(|row| row.uuid == present.uuid);
            going.is_some_and(|row| making.promoted || row.external_ids.contains_key(CREATED))
        };
        let Some(present) = original.present.as_ref().filter(|row| !is_going(row)) else {
            return Ok(None);
        };
        let name = self.port_name(making.source)?;
        let source = &making.source.name;
        let other = |why| Mismatch::Other {
            port: source.clone(),
            other: PortName::new(&name),
            why,
        };
        let addresses =
            |texts: &[String]| -> BTreeSet<_> { port_addresses(texts).into_iter().collect() };
        if present.switch != Some(self.switch) {
            return Err(other("it is not on the switch of the target's node"));
        }
        if !addresses(&making.source.addresses).is_subset(&addresses(&present.addresses)) {
            return Err(other("it does not have the same addresses"));
        }
        let macs = |texts: &[String]| -> BTreeSet<String> {
            let macs = texts
                .iter()
                .filter_map(|text| text.split_whitespace().next());
            macs.filter(|word| word.contains(':'))
                .map(str::to_ascii_lowercase)
                .collect()
        };
        if !macs(&making.source.addresses).is_subset(&macs(&present.addresses)) {
            return Err(other("it does not have the same MAC"));
        }
        let ids = &present.external_ids;
        let vm = self.vm.to_string();
        let of_another = ids.get(VM).is_some_and(|label| *label != vm);
        let told = ids.get(SOURCE_PORT).filter(|told| *told != source.as_str());
        let marked = ids.contains_key(Mark::OWNER) && !ids.contains_key(SOURCE_PORT);
        if of_another || told.is_some() || marked {
            return Err(other("it belongs to another VM or handover"));
        }
        Ok(Some(present))
    }

    /// Adds what makes the target's port, with the source's marked.
    pub(super) fn make(
        &self,
        (pair, making): (&Pair, Making<'_>),
        config: &PortConfig,
        original: &Original,
        switch_of: SwitchOf<'_>,
        tx: &mut Transaction,
    ) -> Result<(), Mismatch> {
        let source = making.source;
        let name = self.port_name(source)?;
        let present = self.present(&making, original)?;
        pair.expect(tx);
        if making.stale.map(|row| row.uuid) != present.map(|row| row.uuid) {
            making.clear(switch_of, tx)?;
        }
        let copied: Vec<_> = original
            .row
            .iter()
            .filter(|(column, _)| !OWN_COLUMNS.contains(column))
            .collect();
        let mut unchanged = Row::new();
        for (column, value) in &copied {
            unchanged = unchanged.set(*column, (*value).clone());
        }
        tx.expect("Logical_Switch_Port", source.uuid, unchanged.clone());
        let groups = original.groups.iter();
        let groups_now = groups
            .clone()
            .map(|(_, name)| Row::new().set("name", name.as_str()));
        tx.wait(
            "Port_Group",
            Condition::includes("ports", Datum::set([source.uuid])),
            ["name"],
            ovsdb_rs::WaitOp::Equal,
            groups_now,
            Some(std::time::Duration::ZERO),
        );
        let port = match present {
            Some(present) => self.take(present, source, config, tx),
            None => self.insert(unchanged.set("name", name), source, config, tx),
        };
        for (group, _) in groups {
            let add = Mutation::insert("ports", port.clone());
            tx.mutate("Port_Group", *group, [add]);
        }
        change_row(source, making.promote(mark_alone(source, config)), tx);
        Ok(())
    }

    /// Takes a port that is there as the target's.
    fn take(
        &self,
        present: &Present,
        source: &PortRow,
        config: &PortConfig,
        tx: &mut Transaction,
    ) -> Datum {
        let now = present.addresses.iter().map(String::as_str);
        let guard = Row::new()
            .set("addresses", Datum::set(now))
            .set("options", map(&present.options))
            .set("external_ids", map(&present.external_ids));
        tx.expect("Logical_Switch_Port", present.uuid, guard);
        let marks = self.adopt(source, config);
        tx.mutate("Logical_Switch_Port", present.uuid, marks);
        Datum::set([present.uuid])
    }

    /// Makes the target's port, a copy but for what is its own.
    fn insert(
        &self,
        copy: Row,
        source: &PortRow,
        config: &PortConfig,
        tx: &mut Transaction,
    ) -> Datum {
        let (options, ids) = self.columns(source, config);
        let row = copy
            .set("options", map(&options))
            .set("external_ids", map(&ids));
        let port = Datum::set([tx.insert("Logical_Switch_Port", row)]);
        let add = Mutation::insert("ports", port.clone());
        tx.mutate("Logical_Switch", self.switch, [add]);
        port
    }

    /// `options` and `external_ids` of a port that segue makes.
    fn columns(
        &self,
        source: &PortRow,
        config: &PortConfig,
    ) -> (BTreeMap<String, String>, BTreeMap<String, String>) {
        let mut options = source.options.clone();
        options.retain(|key, _| !OWN_OPTIONS.contains(&key.as_str()));
        let requested = config.requested_chassis.clone();
        options.extend(requested.map(|both| (REQUESTED_CHASSIS.to_owned(), both)));
        let strategy = config.activation_strategy.clone();
        options.extend(strategy.map(|strategy| (ACTIVATION_STRATEGY.to_owned(), strategy)));
        let mut ids = source.external_ids.clone();
        ids.retain(|key, _| !Mark::KEYS.contains(&key.as_str()) && key != TARGET_PORT);
        ids.extend(self.ids(source, config));
        ids.insert(CREATED.to_owned(), "true".to_owned());
        (options, ids)
    }

    fn ids(&self, source: &PortRow, config: &PortConfig) -> BTreeMap<String, String> {
        let mark = config.mark.as_ref().map(Mark::to_external_ids);
        let mark = mark.into_iter().flatten();
        mark.map(|(key, value)| (key.to_owned(), value))
            .chain([
                (SOURCE_PORT.to_owned(), source.name.to_string()),
                (VM.to_owned(), self.vm.to_string()),
            ])
            .collect()
    }

    /// What marks a port that its network's owner made.
    fn adopt(&self, source: &PortRow, config: &PortConfig) -> Vec<Mutation> {
        let ids = self.ids(source, config);
        let keys = Mark::KEYS.into_iter().chain([SOURCE_PORT, VM]);
        let mut mutations = vec![
            Mutation::delete_keys("external_ids", keys),
            Mutation::insert("external_ids", map(&ids)),
        ];
        if let Some(strategy) = &config.activation_strategy {
            mutations.extend(Mutation::put(
                "options",
                ACTIVATION_STRATEGY,
                strategy.as_str(),
            ));
        }
        mutations
    }
}
