//! The routed topology against rows, and segue's rows of it against a real server.

mod news;
mod pairs;
mod places;
mod rows;
mod statics;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use handover::{RouteWrite, Step, VmName, Write};
use ovsdb_rs::{Atom, Client, Condition, Datum, InsertOp, Mutation, Row, Transaction};

use super::keeper::{Alarms, GONE, Keeper};
use super::names::{ballast, inside_set, place_set};
use super::sweep::strays;
use super::*;
use crate::cluster::{Kind, Listener};
use crate::metrics::Metrics;
use crate::ovn::server::{Server, soon};
use crate::ovn::{
    AddressSet, Databases, LogicalRouter, LogicalRouterPolicy, Owners, View, Writer, Written,
};

const NORTHBOUND: &str = "OVN_Northbound";

/// Lays networks out, one transaction at a time.
pub(crate) struct Plan {
    tx: Transaction,
    switches: BTreeMap<&'static str, Vec<InsertOp>>,
    routers: BTreeMap<&'static str, (BTreeMap<&'static str, &'static str>, Vec<InsertOp>)>,
}

impl Plan {
    fn new() -> Self {
        Self {
            tx: Transaction::new(),
            switches: BTreeMap::new(),
            routers: BTreeMap::new(),
        }
    }

    /// The cluster router, a join switch, a gateway on each of these chassis, a switch for each.
    pub(crate) fn cluster(chassis: &[(&'static str, &'static [&'static str])]) -> Self {
        let mut plan = Self::new();
        plan.router("cluster", None);
        plan.connect("cluster", "join", &["100.64.0.1/16", "fd64::1/64"]);
        for (chassis, networks) in chassis {
            let name = format!("gr-{chassis}").leak();
            plan.router(name, Some(chassis));
            plan.connect(name, "join", networks);
            let (switch, network) = (format!("sw-{chassis}").leak(), "10.20.1.1/24");
            plan.connect("cluster", switch, &[network]);
        }
        plan
    }

    fn router(&mut self, name: &'static str, chassis: Option<&'static str>) {
        let options = chassis.map(|chassis| ("chassis", chassis));
        self.routers
            .insert(name, (options.into_iter().collect(), Vec::new()));
    }

    /// Puts a router on a switch.
    fn connect(&mut self, router: &'static str, switch: &'static str, networks: &[&str]) {
        let name = format!("{router}-{switch}");
        let port = Row::new()
            .set("name", name.as_str())
            .set("mac", "0a:58:a9:fe:01:01")
            .set("networks", Datum::set(networks.iter().copied()));
        let port = self.tx.insert("Logical_Router_Port", port);
        if let Some((_, ports)) = self.routers.get_mut(router) {
            ports.push(port);
        }
        let peer = Row::new()
            .set("name", format!("{switch}-{router}"))
            .set("type", "router")
            .set("addresses", "router")
            .set("options", Datum::map([("router-port", name.as_str())]));
        self.port(switch, peer);
    }

    pub(crate) fn machine(&mut self, switch: &'static str, name: &str, addresses: &str) {
        let row = Row::new()
            .set("name", name)
            .set("addresses", format!("0a:00:00:00:00:01 {addresses}"));
        self.port(switch, row);
    }

    fn port(&mut self, switch: &'static str, row: Row) {
        let port = self.tx.insert("Logical_Switch_Port", row);
        self.switches.entry(switch).or_default().push(port);
    }

    fn transaction(mut self) -> Transaction {
        for (name, ports) in self.switches {
            let ports = Datum::set(ports);
            self.tx.insert(
                "Logical_Switch",
                Row::new().set("name", name).set("ports", ports),
            );
        }
        for (name, (options, ports)) in self.routers {
            let row = Row::new()
                .set("name", name)
                .set("options", Datum::map(options))
                .set("ports", Datum::set(ports));
            self.tx.insert("Logical_Router", row);
        }
        self.tx
    }
}

struct Deaf;

impl Listener for Deaf {
    fn vms_changed(&self, _: BTreeSet<VmName>) {}
    fn world_changed(&self) {}
    fn nodes_changed(&self) {}
    fn everything_changed(&self) {}
    fn layout_changed(&self) {}
    fn addresses_left(&self) {}
    fn malformed(&self, _: Kind) {}
}

/// Every VM of the namespaces `tenant` and `other` exists.
struct Everybody;

impl Owners for Everybody {
    fn knows(&self, vm: &VmName) -> bool {
        ["tenant", "other"].contains(&vm.namespace.as_str())
    }
}

/// A Northbound with a keeper, and a client of somebody else's.
pub(crate) struct Lab {
    pub(crate) databases: Arc<Databases>,
    pub(crate) writer: Arc<Writer>,
    keeper: Keeper<Deaf>,
    other: Client,
    pub(crate) southbound: Client,
    _servers: [Server; 2],
}

pub(crate) const DUAL: &[(&str, &[&str])] = &[
    ("c1", &["100.64.0.2/16", "fd64::2/64"]),
    ("c2", &["100.64.0.3/16", "fd64::3/64"]),
    ("c3", &["100.64.0.4/16", "fd64::4/64"]),
];

impl Lab {
    async fn start(plan: Plan) -> Self {
        let servers = [Server::start("ovn-nb"), Server::start("ovn-sb")];
        let [nb, sb] = [servers[0].connect().await, servers[1].connect().await];
        let other = servers[0].connect().await;
        let southbound = servers[1].connect().await;
        let mut tx = plan.transaction();
        tx.insert("NB_Global", Row::new().set("nb_cfg", 0));
        other.transact(NORTHBOUND, tx).await.unwrap();
        let databases = Arc::new(Databases::start(&nb, &sb, Some("cluster")).unwrap());
        let writer = Arc::new(Writer::start(nb).await.unwrap());
        for (_, replica) in databases.replicas() {
            soon(replica.wait_synced()).await.unwrap();
        }
        let keeper = Keeper::new(
            databases.clone(),
            writer.clone(),
            Arc::new(Metrics::new()),
            Arc::new(Alarms::default()),
            Arc::new(Deaf),
        );
        Self {
            databases,
            writer,
            keeper,
            other,
            southbound,
            _servers: servers,
        }
    }

    /// With the rows written.
    pub(crate) async fn kept(plan: Plan) -> Self {
        let lab = Self::start(plan).await;
        assert!(soon(lab.keeper.keep_once(Instant::now())).await);
        lab
    }

    pub(crate) fn nb(&self) -> ovsdb_rs::Snapshot {
        let [(_, nb), _] = self.databases.replicas();
        nb.snapshot()
    }

    /// Somebody else writes; returns once the replica has it.
    async fn meddle(&self, tx: Transaction) {
        let [(_, nb), _] = self.databases.replicas();
        let mut changed = nb.changed();
        self.other.transact(NORTHBOUND, tx).await.unwrap();
        soon(changed.changed()).await.unwrap();
    }

    fn set(&self, name: &str) -> Option<BTreeSet<String>> {
        let nb = self.nb();
        let mut rows = nb.iter::<AddressSet>();
        rows.find(|(_, row)| row.name == name)
            .map(|(_, row)| row.addresses.clone())
    }

    /// The guests' addresses in a place set.
    pub(crate) fn members(&self, chassis: &str) -> BTreeSet<String> {
        let of = |family| {
            let set = self.set(&place_set(chassis, family)).unwrap_or_default();
            set.into_iter()
                .filter(move |text| !ballast(family).contains(&text.as_str()))
        };
        Family::ALL.into_iter().flat_map(of).collect()
    }

    /// segue's policies, as `router priority match action nexthops`.
    fn policies(&self) -> BTreeSet<String> {
        let nb = self.nb();
        let rows: BTreeMap<_, _> = nb.rows::<LogicalRouterPolicy>().into_iter().collect();
        let mut found = BTreeSet::new();
        for (_, router) in nb.iter::<LogicalRouter>() {
            for row in router.policies.iter().filter_map(|uuid| rows.get(uuid)) {
                let hops = row.nexthops.join(",");
                let (priority, matched, action) = (row.priority, &row.r#match, &row.action);
                found.insert(
                    format!("{} {priority} {matched} {action} {hops}", router.name)
                        .trim_end()
                        .to_owned(),
                );
            }
        }
        found
    }

    fn view(&self, vm: &str) -> View {
        let vm = VmName::new("tenant", vm);
        self.databases.view(&vm, &BTreeSet::new(), &Everybody)
    }

    /// Makes all routes of a view lead to a chassis.
    async fn flip(&self, view: &View, to: Option<&str>) -> Written {
        let routes = view.places.routes.iter().map(|route| RouteWrite {
            route: route.key.clone(),
            from: route.leads_to.clone(),
            to: to.map(str::to_owned),
        });
        let write = Write {
            step: Step::Flip,
            ports: crate::ovn::guards(&view.ports).unwrap(),
            routes: routes.collect(),
            raise_nb_cfg_from: None,
        };
        soon(self.writer.write(&write, view.into(), "test")).await
    }
}

pub(crate) fn texts(texts: &[&str]) -> BTreeSet<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

fn on(
    table: &str,
    condition: Condition,
    mutations: impl IntoIterator<Item = Mutation>,
) -> Transaction {
    let mut tx = Transaction::new();
    tx.mutate(table, condition, mutations);
    tx
}
