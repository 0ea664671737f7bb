//! What OVN's databases say of a port, read independently of the controller.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context as _, Result};
use ovsdb_rs::{Client, ClientOptions, Endpoints, Replica};
use tokio::sync::watch;
use uuid::Uuid;

use crate::lab::Lab;

ovsdb_rs::table! {
    #[derive(Eq)]
    struct LogicalSwitchPort in "Logical_Switch_Port" {
        name: String,
        options: BTreeMap<String, String>,
        external_ids: BTreeMap<String, String>,
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

/// Names of the chassis in whose sets each address is.
pub(super) type Places = BTreeMap<IpAddr, BTreeSet<String>>;

/// Both databases, followed.
#[derive(Clone)]
pub(super) struct Ovn {
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
        let connect = async |endpoint: String| {
            let endpoints: Endpoints = endpoint.parse().context("the lab's endpoint")?;
            Client::connect(endpoints, ClientOptions::default())
                .await
                .with_context(|| format!("connect to {endpoint}"))
        };
        let north = Replica::builder("OVN_Northbound")
            .table::<LogicalSwitchPort>()
            .table::<AddressSet>()
            .start(&connect(lab.nb_endpoint()).await?)?;
        let south = Replica::builder("OVN_Southbound")
            .table::<PortBinding>()
            .table::<Chassis>()
            .start(&connect(lab.sb_endpoint()).await?)?;
        north.wait_synced().await.context("the Northbound")?;
        south.wait_synced().await.context("the Southbound")?;
        Ok(Self { north, south })
    }

    /// Tells of every change of either database.
    pub(super) fn changed(&self) -> Changed {
        Changed(self.north.changed(), self.south.changed())
    }

    /// A port as it is now; `None` where there is no such logical switch port.
    pub(super) fn port(&self, name: &str) -> Option<PortView> {
        let (north, south) = (self.north.snapshot(), self.south.snapshot());
        let (_, row) = north
            .iter::<LogicalSwitchPort>()
            .find(|(_, row)| row.name == name)?;
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
            .find(|(_, row)| row.logical_port == name);
        if let Some((_, binding)) = binding {
            view.chassis = binding.chassis.as_ref().map(chassis);
            view.additional = binding.additional_chassis.iter().map(chassis).collect();
            view.activated = list(binding.options.get("additional-chassis-activated"));
        }
        Some(view)
    }
}

impl Ovn {
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
