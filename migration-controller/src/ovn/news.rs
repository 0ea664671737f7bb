//! What changes in the databases mean for whom.

use std::collections::BTreeSet;
use std::net::IpAddr;

use handover::VmName;
use ovsdb_rs::{Change, Event, TypedChange};
use tokio_util::sync::CancellationToken;

use super::owner::Owners;
use super::replica::likely_owner;
use super::{
    AddressSet, Chassis, Databases, LogicalRouter, LogicalRouterPolicy, LogicalRouterPort,
    LogicalRouterStaticRoute, LogicalSwitch, LogicalSwitchPort, NbGlobal, PortBinding,
};
use crate::cluster::Listener;
use crate::routed::{host, port_addresses};

/// What one step of the Northbound means.
#[derive(Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one thing to tell, independent of the others"
)]
struct News {
    /// VMs whose handovers depend on it.
    vms: BTreeSet<VmName>,
    /// Every open handover may depend on it.
    world: bool,
    /// Every VM may.
    everything: bool,
    /// The routed topology may be another one.
    layout: bool,
    /// An address may be in a place set without a port that has it.
    stray: bool,
}

impl News {
    fn tell(self, listener: &impl Listener) {
        if self.world {
            listener.world_changed();
        }
        if self.layout {
            listener.layout_changed();
        }
        if self.stray {
            listener.addresses_left();
        }
        if self.everything {
            listener.everything_changed();
        }
        listener.vms_changed(self.vms);
    }
}

impl Databases {
    /// Follows the Northbound's changes until `stop`.
    pub(crate) async fn follow_northbound(
        &self,
        listener: &impl Listener,
        owners: &impl Owners,
        stop: &CancellationToken,
    ) {
        let (_, mut changes) = self.nb.subscribe();
        while let Some(Some(event)) = stop.run_until_cancelled(changes.next()).await {
            let Event::Changes(set) = event else {
                listener.everything_changed();
                continue;
            };
            let mut news = News::default();
            for change in &set.changes {
                self.northbound_change(change, owners, &mut news);
            }
            news.tell(listener);
        }
    }

    /// Follows the Southbound's changes until `stop`.
    pub(crate) async fn follow_southbound(
        &self,
        listener: &impl Listener,
        owners: &impl Owners,
        stop: &CancellationToken,
    ) {
        let (_, mut changes) = self.sb.subscribe();
        while let Some(Some(event)) = stop.run_until_cancelled(changes.next()).await {
            let Event::Changes(set) = event else {
                listener.everything_changed();
                continue;
            };
            let mut vms = BTreeSet::new();
            let (mut world, mut nodes) = (false, false);
            for change in &set.changes {
                let Some(binding) = change.of::<PortBinding>() else {
                    nodes |= change.of::<Chassis>().is_some();
                    world = true;
                    continue;
                };
                for row in binding.old.iter().chain(&binding.new) {
                    let ports = self.nb.lookup(&self.ports_by_name, &row.logical_port);
                    vms.extend(
                        ports
                            .iter()
                            .filter_map(|(_, port)| likely_owner(port, owners)),
                    );
                }
            }
            if nodes {
                listener.nodes_changed();
            } else if world {
                listener.world_changed();
            }
            listener.vms_changed(vms);
        }
    }

    fn northbound_change(&self, change: &Change, owners: &impl Owners, news: &mut News) {
        if let Some(port) = change.of::<LogicalSwitchPort>() {
            let rows = port.old.iter().chain(&port.new);
            news.vms
                .extend(rows.filter_map(|row| likely_owner(row, owners)));
            if self.routed.is_some() {
                routed_port_change(&port, news);
            }
        } else if change.of::<NbGlobal>().is_some() {
            news.world = true;
        } else if let Some(set) = change.of::<AddressSet>() {
            self.members_change(&set, owners, news);
        } else if let Some(switch) = change.of::<LogicalSwitch>() {
            news.layout |= self.is_relaid(&switch);
        } else if let Some(router) = change.of::<LogicalRouter>() {
            news.layout |= is_rerouted(&router);
        } else if let Some(route) = change.of::<LogicalRouterStaticRoute>() {
            let rows = route.old.iter().chain(&route.new);
            for address in rows.filter_map(|row| host(&row.ip_prefix)) {
                let holders = self.ports_with(address);
                let holders = holders.iter();
                news.vms
                    .extend(holders.filter_map(|port| likely_owner(port, owners)));
            }
        } else {
            news.layout |= change.of::<LogicalRouterPort>().is_some()
                || change.of::<LogicalRouterPolicy>().is_some();
        }
    }

    /// Whether a switch changed in what the topology is made of. Machines' ports come and go all the
    /// time and are not that.
    fn is_relaid(&self, switch: &TypedChange<LogicalSwitch>) -> bool {
        let (Some(old), Some(new)) = (&switch.old, &switch.new) else {
            return true;
        };
        // Of a port that is no more, its own row's change tells what it was.
        let leads_to_router = |port: &uuid::Uuid| {
            let port = self.nb.get::<LogicalSwitchPort>(port);
            port.is_some_and(|port| port.r#type == "router")
        };
        let mut ports = old.ports.symmetric_difference(&new.ports);
        old.name != new.name || old.external_ids != new.external_ids || ports.any(leads_to_router)
    }

    /// A set that comes or goes changes what is possible for everybody; a member that does, the
    /// place of whoever has that address.
    fn members_change(&self, set: &TypedChange<AddressSet>, owners: &impl Owners, news: &mut News) {
        let (Some(old), Some(new)) = (&set.old, &set.new) else {
            news.layout = true;
            news.everything = true;
            return;
        };
        news.layout |= old.external_ids != new.external_ids || old.name != new.name;
        for text in old.addresses.symmetric_difference(&new.addresses) {
            let Ok(address) = text.parse::<IpAddr>() else {
                news.layout = true;
                continue;
            };
            let holders = self.ports_with(address);
            // Ballast, or a network inside: whoever keeps the rows looks whether it should be so.
            news.layout |= holders.is_empty();
            news.stray |= holders.is_empty() && new.addresses.contains(text);
            let holders = holders.iter();
            news.vms
                .extend(holders.filter_map(|port| likely_owner(port, owners)));
        }
    }
}

/// Whether a router changed in what the topology, or segue's rows, are made of. Static routes come and
/// go with every pod of some networks.
fn is_rerouted(router: &TypedChange<LogicalRouter>) -> bool {
    match (&router.old, &router.new) {
        (Some(old), Some(new)) => !old.is_same_node(new) || old.policies != new.policies,
        _ => true,
    }
}

fn routed_port_change(port: &TypedChange<LogicalSwitchPort>, news: &mut News) {
    let rows = || port.old.iter().chain(&port.new);
    news.layout |= rows().any(|row| row.r#type == "router");
    let addresses = |row: &Option<std::sync::Arc<LogicalSwitchPort>>| -> BTreeSet<IpAddr> {
        let row = row.as_ref();
        row.map(|row| port_addresses(&row.addresses))
            .into_iter()
            .flatten()
            .collect()
    };
    news.stray |= !addresses(&port.old).is_subset(&addresses(&port.new));
}
