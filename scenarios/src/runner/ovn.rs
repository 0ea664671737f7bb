//! What OVN's databases say of a port, read independently of the controller.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use ovsdb_rs::{Client, ClientOptions, Endpoints, Replica};
use tokio::sync::watch;
use uuid::Uuid;

use crate::lab::Lab;
use crate::lab::routed::{PORT_KEY, node_of};

ovsdb_rs::table! {
    #[derive(Eq)]
    struct LogicalSwitchPort in "Logical_Switch_Port" {
        name: String,
        options: BTreeMap<String, String>,
        external_ids: BTreeMap<String, String>,
    }

    #[derive(Eq)]
    struct LogicalSwitch in "Logical_Switch" {
        name: String,
        ports: BTreeSet<Uuid>,
    }

    #[derive(Eq)]
    struct PortGroup in "Port_Group" {
        name: String,
        ports: BTreeSet<Uuid>,
    }

    #[derive(Eq)]
    struct StaticRoute in "Logical_Router_Static_Route" {
        ip_prefix: String,
        output_port: Option<String>,
    }

    #[derive(Eq)]
    struct AddressSet in "Address_Set" {
        addresses: Vec<String>,
        external_ids: BTreeMap<String, String>,
    }

    #[derive(Eq)]
    struct PortBinding in "Port_Binding" {
        logical_port: String,
        chassis: Option<Uuid>,
        additional_chassis: Vec<Uuid>,
        options: BTreeMap<String, String>,
    }

    #[derive(Eq)]
    struct Chassis in "Chassis" {
        name: String,
    }
}

/// The key of an address set that says whose gateway the traffic of its addresses takes
/// (docs/routed.md).
const PLACE: &str = "segue.io/chassis";

/// Names of the chassis in whose sets each address is, or on whose switches a route to it leads.
pub(super) type Places = BTreeMap<IpAddr, BTreeSet<String>>;

/// Both databases, followed.
#[derive(Clone)]
pub(super) struct Ovn {
    endpoints: [String; 2],
    north: Replica,
    south: Replica,
}

/// One port as the two databases have it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PortView {
    /// `options:requested-chassis`, as a list.
    pub requested: Vec<String>,
    /// `options:activation-strategy`.
    pub strategy: Option<String>,
    /// segue's marks: every key of its own in `external_ids` but the one that users set.
    pub marks: BTreeMap<String, String>,
    /// `chassis`, by name.
    pub chassis: Option<String>,
    /// `additional_chassis`, by name.
    pub additional: Vec<String>,
    /// `options:additional-chassis-activated`, as a list.
    pub activated: Vec<String>,
}

impl Ovn {
    /// Follows the databases of a lab.
    pub(super) async fn follow(lab: &Lab) -> Result<Self> {
        Self::follow_at([lab.nb_endpoint(), lab.sb_endpoint()]).await
    }

    /// The databases as they are now: what is followed may be a moment behind.
    pub(super) async fn now(&self) -> Result<Self> {
        Self::follow_at(self.endpoints.clone()).await
    }

    async fn follow_at(endpoints: [String; 2]) -> Result<Self> {
        let connect = async |endpoint: &String| {
            let endpoints: Endpoints = endpoint.parse().context("the lab's endpoint")?;
            Client::connect(endpoints, ClientOptions::default())
                .await
                .with_context(|| format!("connect to {endpoint}"))
        };
        let [north, south] = &endpoints;
        let north = Replica::builder("OVN_Northbound")
            .table::<LogicalSwitchPort>()
            .table::<LogicalSwitch>()
            .table::<PortGroup>()
            .table::<StaticRoute>()
            .table::<AddressSet>()
            .start(&connect(north).await?)?;
        let south = Replica::builder("OVN_Southbound")
            .table::<PortBinding>()
            .table::<Chassis>()
            .start(&connect(south).await?)?;
        north.wait_synced().await.context("the Northbound")?;
        south.wait_synced().await.context("the Southbound")?;
        Ok(Self {
            endpoints,
            north,
            south,
        })
    }

    /// Tells of every change of either database.
    pub(super) fn changed(&self) -> Changed {
        Changed(self.north.changed(), self.south.changed())
    }

    /// A port as it is now; `None` where there is no such logical switch port. The ports of a VM's pods
    /// are one, by what they have in common: while there are two, it is on the chassis of both.
    pub(super) fn port(&self, name: &str) -> Option<PortView> {
        let rows = self.rows(name);
        let views = rows.iter().map(|(_, row)| self.view(row));
        views.reduce(|mut source, target| {
            source.requested.extend(target.requested);
            source.strategy = source.strategy.or(target.strategy);
            source.marks.extend(target.marks);
            let claimed = target.chassis.into_iter().chain(target.additional);
            source.additional.extend(claimed);
            source.activated.extend(target.activated);
            source
        })
    }

    /// Names of the logical switch ports that are this one.
    pub(super) fn names(&self, name: &str) -> Vec<String> {
        let rows = self.rows(name);
        rows.iter().map(|(_, row)| row.name.clone()).collect()
    }

    /// A port's row, or those of the ports of a VM's pods, the one that was there first before.
    fn rows(&self, name: &str) -> Vec<(Uuid, Arc<LogicalSwitchPort>)> {
        let north = self.north.snapshot();
        let is_it = |row: &LogicalSwitchPort| {
            let common = row.external_ids.get(PORT_KEY);
            row.name == name || common.is_some_and(|common| common == name)
        };
        let mut rows = north.rows::<LogicalSwitchPort>();
        rows.retain(|(_, row)| is_it(row));
        rows.sort_by_key(|(_, row)| row.external_ids.contains_key("segue.io/source-port"));
        rows
    }

    fn view(&self, row: &LogicalSwitchPort) -> PortView {
        let south = self.south.snapshot();
        let is_mark = |key: &String| key.starts_with("segue.io/") && key != "segue.io/vm";
        let mut view = PortView {
            requested: list(row.options.get("requested-chassis")),
            strategy: row.options.get("activation-strategy").cloned(),
            marks: row
                .external_ids
                .iter()
                .filter(|(key, _)| is_mark(key))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            ..PortView::default()
        };
        let chassis = |uuid: &Uuid| {
            let row = south.get::<Chassis>(uuid);
            row.map_or_else(|| uuid.to_string(), |row| row.name.clone())
        };
        let binding = south
            .iter::<PortBinding>()
            .find(|(_, binding)| binding.logical_port == row.name);
        if let Some((_, binding)) = binding {
            view.chassis = binding.chassis.as_ref().map(chassis);
            view.additional = binding.additional_chassis.iter().map(chassis).collect();
            view.activated = list(binding.options.get("additional-chassis-activated"));
        }
        view
    }
}

impl Ovn {
    /// Names of the switches that have a port, or those of a VM's pods.
    pub(super) fn switches(&self, name: &str) -> Vec<String> {
        let (north, rows) = (self.north.snapshot(), self.rows(name));
        let has = |ports: &BTreeSet<Uuid>| rows.iter().any(|(uuid, _)| ports.contains(uuid));
        let switches = north.iter::<LogicalSwitch>();
        let having = switches.filter(|(_, switch)| has(&switch.ports));
        having.map(|(_, switch)| switch.name.clone()).collect()
    }

    /// Names of the port groups that a port is in.
    pub(super) fn groups(&self, name: &str) -> BTreeSet<String> {
        let (north, rows) = (self.north.snapshot(), self.rows(name));
        let has = |ports: &BTreeSet<Uuid>| rows.iter().any(|(uuid, _)| ports.contains(uuid));
        let groups = north.iter::<PortGroup>();
        let having = groups.filter(|(_, group)| has(&group.ports));
        having.map(|(_, group)| group.name.clone()).collect()
    }

    /// Names of the nodes on whose switches the static routes to each of these addresses lead.
    pub(super) fn routes(&self, addresses: &[IpAddr]) -> Places {
        let north = self.north.snapshot();
        let to = |address: &IpAddr| {
            let text = address.to_string();
            let routes = north.iter::<StaticRoute>();
            let routes = routes.filter(|(_, route)| {
                let prefix = route.ip_prefix.split('/').next();
                prefix == Some(text.as_str())
            });
            let ports = routes.filter_map(|(_, route)| route.output_port.clone());
            ports
                .map(|port| node_of(&port).map_or(port.clone(), str::to_owned))
                .collect()
        };
        addresses
            .iter()
            .map(|address| (*address, to(address)))
            .collect()
    }

    /// Names of the chassis in whose sets each of these addresses is.
    pub(super) fn places(&self, addresses: &[IpAddr]) -> Places {
        let north = self.north.snapshot();
        let mut places: Places = addresses
            .iter()
            .map(|address| (*address, BTreeSet::new()))
            .collect();
        for (_, set) in north.iter::<AddressSet>() {
            let Some(chassis) = set.external_ids.get(PLACE) else {
                continue;
            };
            let members: BTreeSet<IpAddr> = set
                .addresses
                .iter()
                .filter_map(|address| address.parse().ok())
                .collect();
            for (address, places) in &mut places {
                if members.contains(address) {
                    places.insert(chassis.clone());
                }
            }
        }
        places
    }
}

fn list(value: Option<&String>) -> Vec<String> {
    value
        .into_iter()
        .flat_map(|value| value.split(','))
        .filter(|text| !text.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Tells of every change of either database.
pub(super) struct Changed(watch::Receiver<u64>, watch::Receiver<u64>);

impl Changed {
    /// Returns when something changed since the last time; never where the lab is gone.
    pub(super) async fn next(&mut self) {
        let gone = tokio::select! {
            seen = self.0.changed() => seen.is_err(),
            seen = self.1.changed() => seen.is_err(),
        };
        if gone {
            std::future::pending::<()>().await;
        }
    }
}
