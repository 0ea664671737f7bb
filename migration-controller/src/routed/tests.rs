//! The routed topology against rows, and segue's rows of it against a real server.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use handover::{RouteWrite, Step, VmName, Write};
use ovsdb_rs::{Atom, Client, Condition, Datum, InsertOp, Mutation, Row, Transaction};

use super::keeper::{Alarms, Keeper};
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
struct Plan {
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
    fn cluster(chassis: &[(&'static str, &'static [&'static str])]) -> Self {
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

    fn machine(&mut self, switch: &'static str, name: &str, addresses: &str) {
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
struct Lab {
    databases: Arc<Databases>,
    writer: Arc<Writer>,
    keeper: Keeper<Deaf>,
    other: Client,
    _servers: [Server; 2],
}

const DUAL: &[(&str, &[&str])] = &[
    ("c1", &["100.64.0.2/16", "fd64::2/64"]),
    ("c2", &["100.64.0.3/16", "fd64::3/64"]),
    ("c3", &["100.64.0.4/16", "fd64::4/64"]),
];

impl Lab {
    async fn start(plan: Plan) -> Self {
        let servers = [Server::start("ovn-nb"), Server::start("ovn-sb")];
        let [nb, sb] = [servers[0].connect().await, servers[1].connect().await];
        let other = servers[0].connect().await;
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
            _servers: servers,
        }
    }

    /// With the rows written.
    async fn kept(plan: Plan) -> Self {
        let lab = Self::start(plan).await;
        assert!(soon(lab.keeper.keep_once()).await);
        lab
    }

    fn nb(&self) -> ovsdb_rs::Snapshot {
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
    fn members(&self, chassis: &str) -> BTreeSet<String> {
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
        soon(self.writer.write(&write, view, "test")).await
    }
}

fn texts(texts: &[&str]) -> BTreeSet<String> {
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

// === Finding it ===

#[tokio::test]
async fn the_topology_is_found_from_the_cluster_router() {
    let mut plan = Plan::cluster(&DUAL[..2]);
    // Neither a router without a chassis on the join switch nor a switch of its own is any of ours.
    plan.router("transit", None);
    plan.connect("transit", "join", &["100.64.0.9/16"]);
    plan.router("island", Some("c9"));
    plan.connect("island", "lonely", &["10.9.0.1/24"]);
    let lab = Lab::start(plan).await;
    let (nb, topology) = lab.databases.topology().unwrap();
    let chassis: Vec<_> = topology.gateways.keys().map(String::as_str).collect();
    assert_eq!(chassis, ["c1", "c2"]);
    let gateway = &topology.gateways["c1"];
    assert_eq!(
        (gateway.name.as_str(), gateway.port.as_str()),
        ("gr-c1", "gr-c1-join")
    );
    let hops: Vec<_> = gateway
        .next_hops
        .values()
        .map(ToString::to_string)
        .collect();
    assert_eq!(hops, ["100.64.0.2", "fd64::2"]);
    let inside: Vec<_> = topology.inside.iter().map(ToString::to_string).collect();
    assert_eq!(inside, ["10.20.1.0/24", "100.64.0.0/16", "fd64::/64"]);
    let switches = topology.switches.iter();
    let switches: BTreeSet<_> = switches
        .filter_map(|uuid| Some(nb.get::<crate::ovn::LogicalSwitch>(uuid)?.name.clone()))
        .collect();
    assert_eq!(switches, texts(&["sw-c1", "sw-c2"]));
    assert!(topology.rejected.is_empty(), "{:?}", topology.rejected);
}

#[tokio::test]
async fn a_chassis_has_one_gateway_and_that_has_an_address() {
    let mut plan = Plan::cluster(&DUAL[..1]);
    plan.router("another", Some("c1"));
    plan.connect("another", "join", &["100.64.0.8/16"]);
    plan.router("mute", Some("c7"));
    plan.connect("mute", "join", &["fe80::1/64"]);
    let lab = Lab::start(plan).await;
    let (_, topology) = lab.databases.topology().unwrap();
    assert_eq!(topology.gateways.len(), 1);
    assert_eq!(topology.gateways["c1"].name, "another");
    let told = topology.rejected.join("; ");
    assert!(told.contains("gr-c1") && told.contains("mute"), "{told}");
}

// === The rows ===

#[tokio::test]
async fn the_rows_appear_and_an_unchanged_world_is_not_written_to() {
    let lab = Lab::kept(Plan::cluster(&DUAL[..2])).await;
    let [s1, s2] = ["c1", "c2"].map(|chassis| place_set(chassis, Family::Ip4));
    let [t1, t2] = ["c1", "c2"].map(|chassis| place_set(chassis, Family::Ip6));
    let expected = [
        "cluster 1110 ip4.dst == $segue_inside_ip4 allow".to_owned(),
        "cluster 1110 ip6.dst == $segue_inside_ip6 allow".to_owned(),
        format!("cluster 1100 ip4.src == ${s1} reroute 100.64.0.2"),
        format!("cluster 1100 ip4.src == ${s2} reroute 100.64.0.3"),
        format!("cluster 1100 ip6.src == ${t1} reroute fd64::2"),
        format!("cluster 1100 ip6.src == ${t2} reroute fd64::3"),
        "gr-c1 1110 inport == \"gr-c1-join\" allow".to_owned(),
        "gr-c2 1110 inport == \"gr-c2-join\" allow".to_owned(),
        format!("gr-c1 1100 ip4.dst == ${s2} reroute 100.64.0.3"),
        format!("gr-c2 1100 ip4.dst == ${s1} reroute 100.64.0.2"),
        format!("gr-c1 1100 ip6.dst == ${t2} reroute fd64::3"),
        format!("gr-c2 1100 ip6.dst == ${t1} reroute fd64::2"),
    ];
    assert_eq!(lab.policies(), expected.into());
    assert_eq!(lab.set(&s1), Some(texts(&["192.0.2.1", "192.0.2.2"])));
    assert_eq!(lab.set(&t2), Some(texts(&["2001:db8::1", "2001:db8::2"])));
    assert_eq!(
        lab.set(&inside_set(Family::Ip4)),
        Some(texts(&["10.20.1.0/24", "100.64.0.0/16"]))
    );
    let before = lab.nb().generation();
    assert!(soon(lab.keeper.keep_once()).await);
    assert_eq!(lab.nb().generation(), before);
}

#[tokio::test]
async fn a_family_that_no_gateway_has_has_no_rows_and_one_that_some_have_has_theirs() {
    let only = |networks: &'static [&'static str]| networks;
    let lab = Lab::kept(Plan::cluster(&[
        ("c1", only(&["100.64.0.2/16"])),
        ("c2", only(&["100.64.0.3/16"])),
    ]))
    .await;
    assert!(lab.policies().iter().all(|policy| !policy.contains("ip6")));
    assert_eq!(lab.set(&inside_set(Family::Ip6)), None);

    let lab = Lab::kept(Plan::cluster(&[
        ("c1", only(&["100.64.0.2/16", "fd64::2/64"])),
        ("c2", only(&["100.64.0.3/16"])),
    ]))
    .await;
    assert_eq!(lab.set(&place_set("c2", Family::Ip6)), None);
    // It has no way to the other's address.
    let astray = |policy: &String| policy.starts_with("gr-c2") && policy.contains("ip6");
    assert!(!lab.policies().iter().any(astray));
}

#[tokio::test]
async fn a_gateway_that_goes_takes_its_rows_along_and_nobody_elses() {
    let lab = Lab::kept(Plan::cluster(DUAL)).await;
    let two = Lab::kept(Plan::cluster(&DUAL[..2])).await.policies();
    let mut tx = Transaction::new();
    let foreign = Row::new()
        .set("priority", 1100)
        .set("match", "ip4.src == 10.0.0.1")
        .set("action", "drop");
    let foreign = tx.insert("Logical_Router_Policy", foreign);
    tx.mutate(
        "Logical_Router",
        Condition::eq("name", "cluster"),
        [Mutation::insert("policies", foreign)],
    );
    tx.insert("Address_Set", Row::new().set("name", "segue_theirs_ip4"));
    tx.delete("Logical_Router", Condition::eq("name", "gr-c3"));
    lab.meddle(tx).await;
    assert!(soon(lab.keeper.keep_once()).await);
    assert_eq!(lab.policies(), two);
    assert_eq!(lab.set(&place_set("c3", Family::Ip4)), None);
    let mut tx = Transaction::new();
    let sets = Condition::eq("name", "segue_theirs_ip4");
    let sets = tx.select("Address_Set", sets, ["name"]);
    let policies = Condition::eq("match", "ip4.src == 10.0.0.1");
    let policies = tx.select("Logical_Router_Policy", policies, ["action"]);
    let reply = lab.other.transact(NORTHBOUND, tx).await.unwrap();
    assert_eq!(reply.raw_rows(sets).unwrap().len(), 1);
    assert_eq!(reply.raw_rows(policies).unwrap().len(), 1);
}

#[tokio::test]
async fn a_gateway_that_is_no_gateway_any_more_is_cleared() {
    let lab = Lab::kept(Plan::cluster(&DUAL[..2])).await;
    let gone = [Mutation::delete_keys("options", ["chassis"])];
    lab.meddle(on("Logical_Router", Condition::eq("name", "gr-c2"), gone))
        .await;
    assert!(soon(lab.keeper.keep_once()).await);
    let policies = lab.policies();
    let left = |policy: &&String| policy.starts_with("gr-c2") || policy.contains("100.64.0.3");
    assert_eq!(policies.iter().find(left), None);
}

#[tokio::test]
async fn what_others_broke_is_mended_and_guests_stay_where_they_are() {
    let lab = Lab::kept(Plan::cluster(&DUAL[..2])).await;
    let (before, set) = (lab.policies(), place_set("c1", Family::Ip4));
    let mut tx = Transaction::new();
    tx.mutate(
        "Address_Set",
        Condition::eq("name", set.as_str()),
        [
            Mutation::delete("addresses", "192.0.2.2"),
            Mutation::insert("addresses", "10.20.1.10"),
        ],
    );
    tx.mutate(
        "Address_Set",
        Condition::eq("name", inside_set(Family::Ip4)),
        [
            Mutation::delete("addresses", "10.20.1.0/24"),
            Mutation::insert("addresses", "0.0.0.0/0"),
        ],
    );
    let hop = Row::new().set("nexthops", "100.64.0.66");
    let reroute = Condition::eq("match", format!("ip4.src == ${set}"));
    tx.update("Logical_Router_Policy", reroute, hop);
    lab.meddle(tx).await;
    assert_ne!(lab.policies(), before);
    assert!(soon(lab.keeper.keep_once()).await);
    assert_eq!(lab.policies(), before);
    assert_eq!(
        lab.set(&set),
        Some(texts(&["10.20.1.10", "192.0.2.1", "192.0.2.2"]))
    );
    assert_eq!(
        lab.set(&inside_set(Family::Ip4)),
        Some(texts(&["10.20.1.0/24", "100.64.0.0/16"]))
    );
}

#[tokio::test]
async fn rows_stay_while_there_is_no_cluster_router() {
    let lab = Lab::kept(Plan::cluster(&DUAL[..2])).await;
    let mut tx = Transaction::new();
    tx.update(
        "Logical_Router",
        Condition::eq("name", "cluster"),
        Row::new().set("name", "renamed"),
    );
    lab.meddle(tx).await;
    let before = lab.nb().generation();
    assert!(soon(lab.keeper.keep_once()).await);
    assert_eq!(lab.nb().generation(), before);
}

#[tokio::test]
async fn who_does_not_hold_the_lock_keeps_no_rows() {
    let lab = Lab::start(Plan::cluster(&DUAL[..2])).await;
    let _thief = lab.other.steal("segue_writer").await.unwrap();
    assert!(soon(lab.keeper.keep_once()).await);
    assert!(lab.policies().is_empty());
}

// === Places ===

/// Two ports on routed switches, of both families, and one on a switch of another kind.
fn guests() -> Plan {
    let mut plan = Plan::cluster(&DUAL[..2]);
    plan.machine("sw-c1", "w0.tenant", "10.20.1.10 fd20::10");
    plan.machine("sw-c2", "w0.tenant.blue", "10.20.1.11");
    plan.machine("flat", "w0.tenant.flat", "10.99.0.10");
    plan
}

#[tokio::test]
async fn a_flip_moves_all_addresses_of_all_ports_or_none() {
    let lab = Lab::kept(guests()).await;
    let all = texts(&["10.20.1.10", "10.20.1.11", "fd20::10"]);
    let view = lab.view("w0");
    let keys = view.places.routes.iter().map(|route| route.key.to_string());
    assert_eq!(keys.collect::<BTreeSet<_>>(), all);
    assert_eq!(view.places.gateways, texts(&["c1", "c2"]));
    assert_eq!(lab.flip(&view, Some("c1")).await, Written::Committed);
    assert_eq!(lab.members("c1"), all);

    let placed = lab.view("w0");
    let only = BTreeSet::from(["c1".to_owned()]);
    assert!(
        placed
            .places
            .routes
            .iter()
            .all(|route| route.leads_to == only)
    );
    // What it was decided on is no longer so: somebody else took one away.
    let set = Condition::eq("name", place_set("c1", Family::Ip4));
    let taken = [Mutation::delete("addresses", "10.20.1.11")];
    lab.meddle(on("Address_Set", set, taken)).await;
    assert!(matches!(
        lab.flip(&placed, Some("c2")).await,
        Written::Refused(_)
    ));
    assert_eq!(lab.members("c1"), texts(&["10.20.1.10", "fd20::10"]));
    assert!(lab.members("c2").is_empty());

    assert_eq!(
        lab.flip(&lab.view("w0"), Some("c2")).await,
        Written::Committed
    );
    assert!(lab.members("c1").is_empty());
    assert_eq!(lab.members("c2"), all);
    // Nor does a flip that was made already go through again.
    assert!(matches!(
        lab.flip(&placed, Some("c2")).await,
        Written::Refused(_)
    ));
    assert_eq!(lab.flip(&lab.view("w0"), None).await, Written::Committed);
    assert!(lab.members("c2").is_empty());
}

#[tokio::test]
async fn a_flip_is_refused_by_a_port_that_changed() {
    let meddling = [
        [Mutation::insert(
            "external_ids",
            Datum::map([("foreign", "x")]),
        )],
        [Mutation::insert(
            "options",
            Datum::map([("requested-chassis", "c2")]),
        )],
        [Mutation::insert(
            "addresses",
            Atom::from("0a:00:00:00:00:02 10.20.1.12"),
        )],
    ];
    for mutations in meddling {
        let lab = Lab::kept(guests()).await;
        let view = lab.view("w0");
        let port = Condition::eq("name", "w0.tenant.flat");
        lab.meddle(on("Logical_Switch_Port", port, mutations)).await;
        assert!(matches!(
            lab.flip(&view, Some("c1")).await,
            Written::Refused(_)
        ));
        assert!(lab.members("c1").is_empty());
    }
}

#[tokio::test]
async fn a_damaged_place_is_seen_and_mended() {
    let lab = Lab::kept(guests()).await;
    assert_eq!(
        lab.flip(&lab.view("w0"), Some("c1")).await,
        Written::Committed
    );
    let set = Condition::eq("name", place_set("c2", Family::Ip4));
    let twice = [Mutation::insert("addresses", "10.20.1.10")];
    lab.meddle(on("Address_Set", set, twice)).await;
    let view = lab.view("w0");
    let route = view
        .places
        .routes
        .iter()
        .find(|route| route.key.as_str() == "10.20.1.10");
    assert_eq!(route.unwrap().leads_to, texts(&["c1", "c2"]));
    assert_eq!(lab.flip(&view, Some("c2")).await, Written::Committed);
    assert!(lab.members("c1").is_empty());
    assert_eq!(lab.members("c2").len(), 3);
}

#[tokio::test]
async fn flips_of_different_guests_do_not_refuse_each_other() {
    let mut plan = guests();
    plan.machine("sw-c1", "w1.tenant", "10.20.1.20 fd20::20");
    let lab = Lab::kept(plan).await;
    let [w0, w1] = ["w0", "w1"].map(|vm| lab.view(vm));
    assert_eq!(lab.flip(&w0, Some("c1")).await, Written::Committed);
    assert_eq!(lab.flip(&w1, Some("c1")).await, Written::Committed);
    assert_eq!(lab.members("c1").len(), 5);
}

#[tokio::test]
async fn only_a_chassis_that_carries_every_family_of_the_guest_is_led_to() {
    let only = |networks: &'static [&'static str]| networks;
    let mut plan = Plan::cluster(&[
        ("c1", only(&["100.64.0.2/16", "fd64::2/64"])),
        ("c2", only(&["100.64.0.3/16"])),
    ]);
    plan.machine("sw-c1", "dual.tenant", "10.20.1.10 fd20::10");
    plan.machine("sw-c1", "four.tenant", "10.20.1.11");
    let lab = Lab::kept(plan).await;
    assert_eq!(lab.view("dual").places.gateways, texts(&["c1"]));
    assert_eq!(lab.view("four").places.gateways, texts(&["c1", "c2"]));
}

#[tokio::test]
async fn an_address_that_another_vm_has_too_gets_no_place() {
    let mut plan = guests();
    plan.machine("sw-c2", "x.other", "10.20.1.10");
    // On a switch that is not routed the same address is another one.
    plan.machine("flat", "y.other", "10.20.1.11");
    let lab = Lab::kept(plan).await;
    let places = lab.view("w0").places;
    let disputed: Vec<_> = places.disputed.iter().map(ToString::to_string).collect();
    assert_eq!(disputed, ["10.20.1.10"]);
    let keys: Vec<_> = places
        .routes
        .iter()
        .map(|route| route.key.as_str())
        .collect();
    assert_eq!(keys, ["10.20.1.11", "fd20::10"]);
}

// === Strays ===

#[tokio::test]
async fn an_address_without_a_port_is_taken_out_and_no_other() {
    let lab = Lab::kept(guests()).await;
    assert_eq!(
        lab.flip(&lab.view("w0"), Some("c1")).await,
        Written::Committed
    );
    assert!(strays(&lab.databases).is_empty());
    let set = Condition::eq("name", place_set("c1", Family::Ip4));
    let left = [Mutation::insert(
        "addresses",
        Datum::set(["10.20.1.77", "10.20.1.78"]),
    )];
    lab.meddle(on("Address_Set", set, left)).await;
    let suspects = strays(&lab.databases);
    assert_eq!(suspects.to_string(), "10.20.1.77, 10.20.1.78");
    // One of them gets a port in time.
    let mut plan = Plan::new();
    plan.machine("sw-new", "w7.tenant", "10.20.1.78");
    lab.meddle(plan.transaction()).await;
    assert!(soon(lab.keeper.sweep_once(&suspects)).await);
    assert_eq!(
        lab.members("c1"),
        texts(&["10.20.1.10", "10.20.1.11", "10.20.1.78", "fd20::10"])
    );
    assert!(strays(&lab.databases).is_empty());
    let before = lab.nb().generation();
    assert!(soon(lab.keeper.sweep_once(&suspects)).await);
    assert_eq!(lab.nb().generation(), before);
}

#[tokio::test]
async fn the_keeper_wakes_up_by_itself() {
    let lab = Lab::start(Plan::cluster(&DUAL[..2])).await;
    let alarms = Arc::new(Alarms::default());
    let keeper = Keeper::new(
        lab.databases.clone(),
        lab.writer.clone(),
        Arc::new(Metrics::new()),
        alarms.clone(),
        Arc::new(Deaf),
    );
    let stop = tokio_util::sync::CancellationToken::new();
    let [(_, nb), _] = lab.databases.replicas();
    let mut changed = nb.changed();
    alarms.layout();
    let written = async {
        soon(changed.changed()).await.unwrap();
        stop.cancel();
    };
    tokio::join!(keeper.run(&stop), written);
    assert!(!lab.policies().is_empty());
}
