//! What the nodes' agents are to know of a VM, and what they ask.

use std::collections::BTreeSet;
use std::sync::Arc;

use handover::{GatePolicy, Network, Phase, Side, VmName, Waiting};
use node_hooks_api::agent as wire;

use super::{Case, Work};
use crate::agents::{Front, MigrationView, Post, Standing, VmView};
use crate::cluster::{Cluster, Listener, VmObjects};
use crate::kubevirt::VirtualMachineInstanceMigration;
use crate::observe::Ending;
use crate::ovn::{PortRow, ends};
use crate::policy::Settings;
use crate::routed::port_addresses;

/// Where the agents' news go, and what their questions depend on.
pub(crate) struct Reception {
    pub(crate) work: Arc<Work>,
    pub(crate) cluster: Arc<Cluster>,
    /// Where no policy says otherwise.
    pub(crate) settings: Settings,
}

impl Front for Reception {
    fn wake(&self, vm: &VmName) {
        self.work.vms_changed(BTreeSet::from([vm.clone()]));
    }

    fn gate(&self, vm: &VmName) -> GatePolicy {
        let vmi = self.cluster.vm(vm).vmi;
        let policy = vmi.and_then(|vmi| self.cluster.policy(&vmi));
        let settings = policy.map(|policy| policy.apply(self.settings));
        settings.unwrap_or(self.settings).gate
    }
}

/// The handover that the agents of both its ends are to be armed for, if there is one.
pub(super) fn standing(vm: &VmName, cases: &[Case], rows: &[PortRow]) -> Option<Standing> {
    let is_armed = |case: &&Case| {
        let phase = case.record.status.phase;
        !(phase.is_final() || phase == Phase::Pending || case.decision.superseded)
    };
    let case = cases.iter().find(is_armed)?;
    let (spec, status) = (&case.record.spec, &case.record.status);
    let of_handover = |name: &str| spec.ports.iter().any(|port| port == name);
    // Both ends have each port, in the same order.
    let ports = ends(rows)
        .into_iter()
        .filter(|(name, _, _)| of_handover(name.as_str()))
        .filter_map(|(_, source, target)| Some((port(&source)?, port(&target)?)));
    let (sources, targets) = ports.unzip();
    Some(Standing {
        vm: vm.clone(),
        migration: spec.migration.uid.clone(),
        epoch: spec.epoch().0,
        source: Post {
            node: spec.source.as_ref()?.node.clone(),
            ports: sources,
        },
        target: Post {
            node: spec.target.as_ref()?.node.clone(),
            ports: targets,
        },
        prepared: is_prepared(case),
        paused: status.step(crate::api::TimelineStep::Paused).is_some(),
    })
}

/// Whether the barrier is met, whatever the guest did since.
fn is_prepared(case: &Case) -> bool {
    let in_flight = matches!(
        case.decision.phase,
        Phase::Ready | Phase::Switching | Phase::Switched
    );
    let met = matches!(
        case.decision.waiting,
        Some(Waiting::Guest | Waiting::MigrationEnd)
    );
    in_flight && met && case.decision.write.is_none()
}

/// A port as an agent knows it; nothing where its MAC is not known. Source: ovn-nb(5),
/// `Logical_Switch_Port.addresses`.
fn port(row: &PortRow) -> Option<wire::Port> {
    let mac = |element: &String| {
        let mac = element.split_whitespace().next()?;
        let octets: Vec<_> = mac.split(':').collect();
        let is_octet =
            |text: &&str| text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        (octets.len() == 6 && octets.iter().all(is_octet)).then(|| mac.to_ascii_lowercase())
    };
    let element = row
        .addresses
        .iter()
        .find(|element| mac(element).is_some())?;
    let addresses = port_addresses(std::slice::from_ref(element));
    Some(wire::Port {
        name: row.name.to_string(),
        mac: mac(element)?,
        addresses: addresses.iter().map(ToString::to_string).collect(),
    })
}

/// The node where the guest runs, once nothing moves it.
pub(super) fn guest_on(cases: &[Case], objects: &VmObjects) -> Option<String> {
    let told = || {
        let node = objects.vmi.as_ref()?.node_name()?;
        Some(node.to_owned())
    };
    let Some(newest) = cases.first() else {
        return told();
    };
    let spec = &newest.record.spec;
    let place = match &newest.seen.ending {
        Ending::On(Side::Source) => &spec.source,
        Ending::On(Side::Target) => &spec.target,
        Ending::Elsewhere { node, .. } => return Some(node.clone()),
        Ending::Gone => return None,
        Ending::Running => return told(),
    };
    place.as_ref().map(|place| place.node.clone())
}

/// What the gate is answered by.
pub(super) fn view(objects: &VmObjects, cases: &[Case]) -> VmView {
    let migration = |migration: &Arc<VirtualMachineInstanceMigration>| {
        let uid = migration.metadata.uid.clone()?;
        let case = cases.iter().find(|case| case.record.uid() == uid);
        Some(MigrationView {
            over: migration.end().is_some(),
            network: if migration.is_between_clusters() {
                let why = "the guest leaves for, or comes from, another cluster".to_owned();
                Network::NotWanted { why }
            } else {
                case.map_or_else(|| finished(objects, &uid), network)
            },
            uid,
        })
    };
    let migrations = objects.migrations.iter().rev();
    VmView {
        uid: objects
            .vmi
            .as_ref()
            .and_then(|vmi| vmi.metadata.uid.clone()),
        migrations: migrations.filter_map(migration).collect(),
    }
}

fn network(case: &Case) -> Network {
    let status = &case.record.status;
    let word = |text: &Option<String>| text.clone().unwrap_or_else(|| status.phase.to_string());
    match status.phase {
        Phase::Pending | Phase::Preparing => {
            let nothing = case.seen.observed.ports.is_empty() && case.seen.damaged.is_empty();
            if nothing {
                let why = "no logical switch port of this VM is known".to_owned();
                Network::NotWanted { why }
            } else {
                let waiting = word(&status.message);
                Network::Preparing { waiting }
            }
        }
        Phase::Ready
        | Phase::Switching
        | Phase::Switched
        | Phase::Finalising
        | Phase::Succeeded => Network::Prepared,
        Phase::RollingBack | Phase::RolledBack | Phase::Failed => {
            let told = status.failure_reason.as_ref().or(status.message.as_ref());
            Network::Failed {
                why: word(&told.cloned()),
            }
        }
    }
}

/// How the network stands of a migration whose handover is over, or never was.
fn finished(objects: &VmObjects, uid: &str) -> Network {
    let mut handovers = objects.handovers.iter();
    let handover = handovers.find(|handover| handover.spec.migration.uid == uid);
    let status = handover.and_then(|handover| handover.status.as_ref());
    match status.map(|status| status.phase) {
        Some(Phase::RolledBack) => Network::Failed {
            why: status
                .and_then(|status| status.failure_reason.clone())
                .unwrap_or_else(|| "it was rolled back".to_owned()),
        },
        Some(Phase::Succeeded) => Network::Prepared,
        _ => Network::Unknown,
    }
}
