//! The peers' writes, each a transaction of its own.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use ovsdb_rs::{Client, ClientOptions, Condition, Datum, Endpoints, Mutation, Row, Transaction};
use serde::Deserialize;
use uuid::Uuid;

use crate::lab::routed::PORT_KEY;

use super::Error;

const DATABASE: &str = "OVN_Northbound";
const PORTS: &str = "Logical_Switch_Port";
const REQUESTED: &str = "requested-chassis";
const STRATEGY: &str = "activation-strategy";

/// A connection to write over.
#[derive(Clone, Debug)]
pub(in super::super) struct Northbound(Client);

/// A pod's port, as far as another pod's is made of it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct PodPort {
    pub(super) name: String,
    pub(super) addresses: Vec<String>,
    port_security: Vec<String>,
    external_ids: BTreeMap<String, String>,
    dhcpv4_options: Option<Uuid>,
    dhcpv6_options: Option<Uuid>,
}

/// What a port is to be made as.
#[derive(Clone, Copy, Debug)]
pub(super) struct Making<'a> {
    pub(super) name: &'a str,
    /// The logical switch that it is to be on.
    pub(super) switch: &'a str,
    pub(super) chassis: &'a str,
    /// Traffic passes it from the start. Otherwise it has no addresses either: OVN would drop what is for them, wherever
    /// else they are.
    pub(super) enabled: bool,
}

// === impl Northbound ===

impl Northbound {
    /// Connects to a Northbound, like `tcp:172.30.0.1:6641`.
    pub(in super::super) async fn connect(endpoint: &str) -> Result<Self> {
        let endpoints: Endpoints = endpoint.parse().context("the lab's endpoint")?;
        let client = Client::connect(endpoints, ClientOptions::default()).await;
        Ok(Self::over(
            client.with_context(|| format!("connect to {endpoint}"))?,
        ))
    }

    pub(super) fn over(client: Client) -> Self {
        Self(client)
    }

    /// Sets what a port requests: one chassis or a list, and an activation strategy or none.
    pub(super) async fn request(
        &self,
        port: &str,
        chassis: &str,
        strategy: Option<&str>,
    ) -> Result<(), Error> {
        let mut wanted = vec![(REQUESTED, chassis)];
        wanted.extend(strategy.map(|strategy| (STRATEGY, strategy)));
        let mut tx = Transaction::new();
        let mutations = [
            Mutation::delete_keys("options", [REQUESTED, STRATEGY]),
            Mutation::insert("options", Datum::map(wanted)),
        ];
        let changed = tx.mutate(PORTS, Condition::eq("name", port), mutations);
        let what = || format!("has port {port} request {chassis}");
        let reply = self.transact(tx, what).await?;
        match reply.count(changed) {
            Ok(1) => Ok(()),
            Ok(_) => Err(Error::NoPort(port.to_owned())),
            Err(source) => Err(Error::Write {
                what: what(),
                source,
            }),
        }
    }

    /// The one port that a VM's pods have; `common` is what all ports of its pods have in common.
    pub(super) async fn pod_port(&self, common: &str) -> Result<(Uuid, PodPort), Error> {
        let mut tx = Transaction::new();
        let of_pods = Condition::includes("external_ids", Datum::map([(PORT_KEY, common)]));
        let found = tx.select(PORTS, of_pods, COLUMNS);
        let what = || format!("tells which port is {common}");
        let reply = self.transact(tx, what).await?;
        let rows = reply
            .rows::<PodPort>(found)
            .map_err(|source| Error::Write {
                what: what(),
                source,
            })?;
        let found = rows.len();
        let mut rows = rows.into_iter();
        match (rows.next(), rows.next()) {
            (Some(only), None) => Ok(only),
            _ => Err(Error::PodPorts {
                common: common.to_owned(),
                found,
            }),
        }
    }

    /// Makes a port for the target's pod like that of the source's, in the same port groups.
    pub(super) async fn make_like(
        &self,
        (source, like): &(Uuid, PodPort),
        making: Making<'_>,
    ) -> Result<(), Error> {
        let Making {
            name,
            switch,
            chassis,
            enabled,
        } = making;
        let mut row = Row::new()
            .set("name", name)
            .set("options", Datum::map([(REQUESTED, chassis)]))
            .set("port_security", strings(&like.port_security))
            .set("external_ids", like.external_ids.clone());
        for (column, options) in [
            ("dhcpv4_options", like.dhcpv4_options),
            ("dhcpv6_options", like.dhcpv6_options),
        ] {
            if let Some(options) = options {
                row = row.set(column, options);
            }
        }
        row = if enabled {
            row.set("addresses", strings(&like.addresses))
        } else {
            row.set("enabled", false)
        };
        let mut tx = Transaction::new();
        let made = tx.insert(PORTS, row);
        let join = [Mutation::insert("ports", Datum::set([made.reference()]))];
        let on = Condition::eq("name", switch);
        let switches = tx.mutate("Logical_Switch", on, join.clone());
        let groups = Condition::includes("ports", Datum::set([*source]));
        tx.mutate("Port_Group", groups, join);
        let what = || format!("makes port {name} on switch {switch}");
        let reply = self.transact(tx, what).await?;
        match reply.count(switches) {
            Ok(1) => Ok(()),
            Ok(_) => Err(Error::NoSwitch(switch.to_owned())),
            Err(source) => Err(Error::Write {
                what: what(),
                source,
            }),
        }
    }

    /// Gives one port the addresses and shuts the other, at once.
    pub(super) async fn swap(
        &self,
        open: &str,
        shut: &str,
        addresses: &[String],
    ) -> Result<(), Error> {
        let mut tx = Transaction::new();
        let with = Row::new()
            .set("enabled", true)
            .set("addresses", strings(addresses));
        let without = Row::new()
            .set("enabled", false)
            .set("addresses", Datum::empty());
        let opened = tx.update(PORTS, Condition::eq("name", open), with);
        // It may have gone by now, with its pod.
        tx.update(PORTS, Condition::eq("name", shut), without);
        let what = || format!("opens port {open} and shuts port {shut}");
        let reply = self.transact(tx, what).await?;
        match reply.count(opened) {
            Ok(1) => Ok(()),
            Ok(_) => Err(Error::NoPort(open.to_owned())),
            Err(source) => Err(Error::Write {
                what: what(),
                source,
            }),
        }
    }

    /// Leads the host routes of a VM's pods out of another port of the cluster router, in place.
    pub(super) async fn lead(&self, common: &str, output_port: &str) -> Result<(), Error> {
        let mut tx = Transaction::new();
        let of_pods = Condition::includes("external_ids", Datum::map([(PORT_KEY, common)]));
        let out = Row::new().set("output_port", output_port);
        tx.update("Logical_Router_Static_Route", of_pods, out);
        let what = || format!("leads the routes of {common} out of {output_port}");
        self.transact(tx, what).await.map(drop)
    }

    async fn transact(
        &self,
        tx: Transaction,
        what: impl Fn() -> String,
    ) -> Result<ovsdb_rs::TransactionReply, Error> {
        let done = self.0.transact(DATABASE, tx).await;
        done.map_err(|source| Error::Write {
            what: what(),
            source,
        })
    }
}

/// Columns of a [`PodPort`].
const COLUMNS: [&str; 6] = [
    "name",
    "addresses",
    "port_security",
    "external_ids",
    "dhcpv4_options",
    "dhcpv6_options",
];

fn strings(texts: &[String]) -> Datum {
    Datum::set(texts.iter().map(String::as_str))
}
