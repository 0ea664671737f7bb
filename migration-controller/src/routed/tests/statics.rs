//! Static routes that others own, in networks with a port for every pod.

use handover::{Epoch, Expected, Mark, MigrationUid, Original, PortConfig, PortName, PortWrite};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::api::RoutingMode;
use crate::ovn::{Basis, LogicalSwitch, LogicalSwitchPort, PortRow, Target, read_config, shown};
use crate::policy::Settings;

pub(super) const BEFORE: &str = "tenant_virt-launcher-w0-a";
pub(super) const AFTER: &str = "tenant_virt-launcher-w0-b";

/// A guest's port on the switch of node `sw-c1`, in a port group, with the route to it.
pub(super) async fn lab(ids: &[(&'static str, &'static str)]) -> Lab {
    let mut plan = Plan::cluster(DUAL);
    let ids = ids
        .iter()
        .copied()
        .chain([("segue.io/vm", "tenant/w0"), ("foreign", "x")]);
    let row = Row::new()
        .set("name", BEFORE)
        .set("addresses", "0a:00:00:00:00:01 10.20.1.10")
        .set("port_security", "0a:00:00:00:00:01 10.20.1.10")
        .set("options", Datum::map([("iface-id-ver", "7")]))
        .set("external_ids", Datum::map(ids));
    plan.port("sw-c1", row);
    let lab = Lab::start(plan).await;
    let mut tx = Transaction::new();
    for (chassis, ip) in [
        ("c1", "192.0.2.1"),
        ("c2", "192.0.2.2"),
        ("c3", "192.0.2.3"),
    ] {
        let encap = Row::new()
            .set("type", "geneve")
            .set("ip", ip)
            .set("chassis_name", chassis);
        let encap = tx.insert("Encap", encap);
        let row = Row::new()
            .set("name", chassis)
            .set("hostname", format!("sw-{chassis}"))
            .set("encaps", encap);
        tx.insert("Chassis", row);
    }
    lab.southbound.transact("OVN_Southbound", tx).await.unwrap();
    let [_, (_, sb)] = lab.databases.replicas();
    let mut changed = sb.changed();
    while lab.view("w0").chassis_of("c2", &Everybody).is_err() {
        soon(changed.changed()).await.unwrap();
    }
    let port = lab.port(BEFORE).unwrap().0;
    let mut tx = Transaction::new();
    let group = Row::new()
        .set("name", "pg")
        .set("ports", Datum::set([port]));
    tx.insert("Port_Group", group);
    let route = Row::new()
        .set("ip_prefix", "10.20.1.10")
        .set("nexthop", "10.20.1.10")
        .set("output_port", "cluster-sw-c1");
    let route = tx.insert("Logical_Router_Static_Route", route);
    let router = Condition::eq("name", "cluster");
    let add = [Mutation::insert("static_routes", route)];
    tx.mutate("Logical_Router", router, add);
    lab.meddle(tx).await;
    lab
}

impl Lab {
    pub(super) fn port(&self, name: &str) -> Option<(uuid::Uuid, Arc<LogicalSwitchPort>)> {
        let rows = self.nb().rows::<LogicalSwitchPort>();
        rows.into_iter().find(|(_, row)| row.name == name)
    }

    /// Names of the ports on a switch, less those of routers.
    pub(super) fn on_switch(&self, switch: &str) -> Vec<String> {
        let nb = self.nb();
        let rows = nb.rows::<LogicalSwitch>();
        let found = rows.iter().find(|(_, row)| row.name == switch).unwrap();
        let ports = found.1.ports.iter();
        let ports = ports.filter_map(|uuid| nb.get::<LogicalSwitchPort>(uuid));
        let machines = ports.filter(|port| port.r#type.is_empty());
        machines.map(|port| port.name.clone()).collect()
    }

    /// Names of the ports in the port group.
    pub(super) async fn group(&self) -> BTreeSet<String> {
        #[derive(serde::Deserialize)]
        struct Group {
            ports: BTreeSet<uuid::Uuid>,
        }
        let mut tx = Transaction::new();
        let rows = tx.select("Port_Group", Condition::eq("name", "pg"), ["ports"]);
        let reply = self.other.transact(NORTHBOUND, tx).await.unwrap();
        let groups: Vec<(_, Group)> = reply.rows(rows).unwrap();
        let nb = self.nb();
        let ports = groups.iter().flat_map(|(_, group)| &group.ports);
        let ports = ports.filter_map(|uuid| nb.get::<LogicalSwitchPort>(uuid));
        ports.map(|port| port.name.clone()).collect()
    }

    pub(super) fn output_port(&self) -> Option<String> {
        let rows = self.nb().rows::<crate::ovn::LogicalRouterStaticRoute>();
        rows.first().and_then(|(_, row)| row.output_port.clone())
    }

    /// The one port that the decisions see.
    fn seen(&self) -> PortRow {
        let rows = shown(&self.view("w0").ports);
        assert_eq!(rows.len(), 1, "{rows:?}");
        rows.into_iter().next().unwrap()
    }

    /// Makes the one port look like `config`, and its route lead to a chassis.
    async fn make(&self, view: &View, config: &PortConfig, to: Option<&str>) -> Written {
        let ports = shown(&view.ports).into_iter().map(|row| PortWrite {
            port: row.name.clone(),
            expected: Expected::of(&read_config(&row).unwrap()),
            config: config.clone(),
        });
        let routes = view.statics.routes.iter().filter(|_| to.is_some());
        let routes = routes.map(|route| RouteWrite {
            route: route.key.clone(),
            from: route.leads_to.clone(),
            to: to.map(str::to_owned),
        });
        let write = Write {
            step: Step::Arm,
            ports: ports.collect(),
            routes: routes.collect(),
            raise_nb_cfg_from: None,
        };
        let target = target(view, config.mark.as_ref().unwrap_or(&mark()));
        let basis = Basis {
            view,
            static_routes: true,
            target: Some(&target),
        };
        soon(self.writer.write(&write, basis, "test")).await
    }

    /// The same, on what is there now; it must go through, and be seen as it was asked for.
    async fn made(&self, config: &PortConfig) {
        let written = self.make(&self.view("w0"), config, None).await;
        assert_eq!(written, Written::Committed);
        assert_eq!(read_config(&self.seen()).as_ref(), Ok(config));
    }
}

/// Where the counterpart for a mark's target is to be: each chassis has a pod of its own.
pub(super) fn target(view: &View, mark: &Mark) -> Target {
    let pod = |chassis: &str| {
        let letter = BTreeMap::from([("c1", "a"), ("c2", "b"), ("c3", "c")])[chassis];
        format!("virt-launcher-w0-{letter}")
    };
    Target {
        vm: VmName::new("tenant", "w0"),
        pods: (pod(&mark.source), pod(&mark.target)),
        switch: view.statics.switch_for(&mark.target).unwrap(),
    }
}

fn mark() -> Mark {
    Mark {
        migration: MigrationUid::new("m-1"),
        epoch: Epoch(7),
        source: "c1".into(),
        target: "c2".into(),
        original: Original::default(),
        barrier: None,
        source_released: false,
    }
}

fn asking(requested: &str, strategy: Option<&str>) -> PortConfig {
    PortConfig {
        requested_chassis: Some(requested.into()),
        activation_strategy: strategy.map(Into::into),
        mark: Some(mark()),
    }
}

fn armed() -> PortConfig {
    asking("c1,c2", Some("rarp"))
}

#[tokio::test]
async fn the_targets_port_is_a_copy_and_stays_alone_after_a_success() {
    let lab = lab(&[]).await;
    let before = lab.port(BEFORE).unwrap().1;
    lab.made(&armed()).await;
    assert_eq!(lab.on_switch("sw-c2"), [AFTER]);
    let (source, target) = (lab.port(BEFORE).unwrap().1, lab.port(AFTER).unwrap().1);
    assert_eq!(source.options, before.options);
    assert_eq!(target.addresses, before.addresses);
    assert_eq!(target.options["requested-chassis"], "c1,c2");
    assert_eq!(target.options["activation-strategy"], "rarp");
    assert!(!target.options.contains_key("iface-id-ver"), "of a pod");
    assert_eq!(target.external_ids["foreign"], "x");
    assert_eq!(lab.group().await, texts(&[BEFORE, AFTER]));

    let mut waiting = armed();
    waiting.mark.as_mut().unwrap().barrier = Some(5);
    lab.made(&waiting).await;
    let target = lab.port(AFTER).unwrap().1;
    assert_eq!(target.options["requested-chassis"], "c1,c2", "stays shut");
    assert_eq!(target.external_ids["segue.io/barrier"], "5");

    lab.made(&asking("c2", None)).await;
    assert!(lab.on_switch("sw-c1").is_empty());
    lab.made(&PortConfig::default()).await;
    let target = lab.port(AFTER).unwrap().1;
    assert!(target.options.is_empty(), "{target:?}");
    assert_eq!(target.external_ids, before.external_ids);
    assert_eq!(lab.group().await, texts(&[AFTER]));
}

#[tokio::test]
async fn nothing_is_left_of_it_after_a_roll_back() {
    let lab = lab(&[]).await;
    let before = lab.port(BEFORE).unwrap().1;
    lab.made(&armed()).await;
    lab.made(&asking("c1", None)).await;
    assert!(lab.on_switch("sw-c2").is_empty());
    lab.made(&PortConfig::default()).await;
    assert_eq!(lab.port(BEFORE).unwrap().1, before);
    assert_eq!(lab.group().await, texts(&[BEFORE]));
}

#[tokio::test]
async fn a_port_that_the_networks_owner_made_is_taken_and_left() {
    let lab = lab(&[]).await;
    let mut tx = Transaction::new();
    let row = Row::new()
        .set("name", AFTER)
        .set("addresses", "0a:00:00:00:00:01 10.20.1.10")
        .set("external_ids", Datum::map([("pod", "true")]));
    let port = tx.insert("Logical_Switch_Port", row);
    let switch = Condition::eq("name", "sw-c2");
    tx.mutate("Logical_Switch", switch, [Mutation::insert("ports", port)]);
    lab.meddle(tx).await;
    lab.made(&armed()).await;
    assert_eq!(lab.port(AFTER).unwrap().1.external_ids["pod"], "true");
    assert_eq!(lab.group().await, texts(&[BEFORE, AFTER]));
    lab.made(&asking("c1", None)).await;
    let left = lab.port(AFTER).unwrap().1;
    assert_eq!(
        left.external_ids.get("pod").map(String::as_str),
        Some("true")
    );
    assert!(!left.external_ids.contains_key(Mark::OWNER), "{left:?}");
    assert!(left.options.is_empty(), "{left:?}");
}

#[tokio::test]
async fn what_the_targets_port_is_called_is_told_or_follows_from_the_pods_names() {
    let lab = lab(&[("segue.io/target-port", "told")]).await;
    lab.made(&armed()).await;
    assert_eq!(lab.on_switch("sw-c2"), ["told"]);
    lab.made(&asking("c1", None)).await;
    let mut rename = Transaction::new();
    let other = Row::new()
        .set("name", "vm1")
        .set("external_ids", Datum::map([("segue.io/vm", "tenant/w0")]));
    rename.update("Logical_Switch_Port", Condition::eq("name", BEFORE), other);
    lab.meddle(rename).await;
    let written = lab.make(&lab.view("w0"), &armed(), None).await;
    let Written::Failed(why) = written else {
        panic!("{written:?}");
    };
    assert!(
        why.contains("vm1") && why.contains("segue.io/target-port"),
        "{why}"
    );
    assert!(lab.on_switch("sw-c2").is_empty());
}

#[tokio::test]
async fn a_route_is_led_elsewhere_in_place_together_with_the_ports_or_not_at_all() {
    let lab = lab(&[]).await;
    lab.made(&armed()).await;
    let view = lab.view("w0");
    let [route] = &view.statics.routes[..] else {
        panic!("{:?}", view.statics.routes);
    };
    assert_eq!(route.leads_to, texts(&["c1"]));
    assert_eq!(view.statics.gateways, texts(&["c1", "c2"]));
    assert_eq!(
        lab.make(&view, &armed(), Some("c2")).await,
        Written::Committed
    );
    assert_eq!(lab.output_port().as_deref(), Some("cluster-sw-c2"));

    // Decided on what is no longer so: the route was moved; then, one of the two ports has changed.
    let refused = lab.make(&view, &asking("c2", None), Some("c2")).await;
    assert!(matches!(refused, Written::Refused(_)), "{refused:?}");
    assert_eq!(read_config(&lab.seen()), Ok(armed()));
    let view = lab.view("w0");
    let port = Condition::eq("name", AFTER);
    let meddled = [Mutation::insert("options", Datum::map([("x", "y")]))];
    lab.meddle(on("Logical_Switch_Port", port, meddled)).await;
    let refused = lab.make(&view, &armed(), Some("c1")).await;
    assert!(matches!(refused, Written::Refused(_)), "{refused:?}");
    assert_eq!(lab.output_port().as_deref(), Some("cluster-sw-c2"));
}

#[tokio::test]
async fn a_source_port_that_its_owner_removed_holds_nothing_up() {
    let lab = lab(&[]).await;
    lab.made(&armed()).await;
    let gone = Datum::set([lab.port(BEFORE).unwrap().0]);
    let switch = Condition::eq("name", "sw-c1");
    let remove = [Mutation::delete("ports", gone)];
    lab.meddle(on("Logical_Switch", switch, remove)).await;
    let flipped = lab.make(&lab.view("w0"), &armed(), Some("c2")).await;
    assert_eq!(flipped, Written::Committed);
    assert_eq!(lab.output_port().as_deref(), Some("cluster-sw-c2"));
    lab.made(&asking("c2", None)).await;
    assert_eq!(
        lab.port(AFTER).unwrap().1.options["requested-chassis"],
        "c2"
    );
    lab.made(&PortConfig::default()).await;
    assert!(lab.port(AFTER).unwrap().1.options.is_empty());
}

#[tokio::test]
async fn a_pair_is_one_port_that_two_chassis_have() {
    let lab = lab(&[]).await;
    lab.made(&armed()).await;
    let mut view = lab.view("w0");
    for row in &mut view.ports {
        if row.name.as_str() == AFTER {
            row.binding.additional = vec!["c2".to_owned()];
            row.activated = texts(&["c2"]);
        } else {
            row.binding.chassis = Some("c1".to_owned());
        }
    }
    let rows = shown(&view.ports);
    assert_eq!(rows[0].name, PortName::new(BEFORE));
    assert_eq!(rows[0].binding.chassis.as_deref(), Some("c1"));
    assert_eq!(rows[0].binding.additional, ["c2"]);
    assert_eq!(rows[0].activated, texts(&["c2"]));
    // One that its owner made is claimed as any port is.
    let mut owned = view.ports.clone();
    for row in &mut owned {
        if let Some(chassis) = row.binding.additional.pop() {
            row.binding.chassis = Some(chassis);
        }
    }
    assert_eq!(shown(&owned)[0].binding.additional, ["c2"]);
    // The source's pod is gone, and its port with it.
    view.ports.retain(|row| row.name.as_str() == AFTER);
    let rows = shown(&view.ports);
    assert_eq!(rows[0].name, PortName::new(BEFORE));
    assert_eq!(rows[0].binding.chassis, None);
    assert_eq!(rows[0].binding.additional, ["c2"]);
}

#[tokio::test]
async fn a_node_without_a_switch_of_its_own_shares_the_port() {
    let lab = lab(&[]).await;
    let view = lab.view("w0");
    let write = Write {
        step: Step::Arm,
        ports: vec![PortWrite {
            port: PortName::new(BEFORE),
            expected: Expected::of(&read_config(&view.ports[0]).unwrap()),
            config: armed(),
        }],
        routes: Vec::new(),
        raise_nb_cfg_from: None,
    };
    let written = soon(lab.writer.write(&write, (&view).into(), "test")).await;
    assert_eq!(written, Written::Committed);
    let row = lab.port(BEFORE).unwrap().1;
    assert_eq!(row.options["requested-chassis"], "c1,c2");
}

/// Somebody puts a port on a switch.
async fn put(lab: &Lab, switch: &str, row: Row) {
    let mut tx = Transaction::new();
    let port = tx.insert("Logical_Switch_Port", row);
    let switch = Condition::eq("name", switch);
    tx.mutate("Logical_Switch", switch, [Mutation::insert("ports", port)]);
    lab.meddle(tx).await;
}

/// Somebody adds a route to the cluster router.
async fn route(lab: &Lab, prefix: &str, output_port: &[&str]) {
    let mut tx = Transaction::new();
    let row = Row::new()
        .set("ip_prefix", prefix)
        .set("nexthop", "10.20.1.10")
        .set("output_port", Datum::set(output_port.iter().copied()));
    let row = tx.insert("Logical_Router_Static_Route", row);
    let router = Condition::eq("name", "cluster");
    let add = [Mutation::insert("static_routes", row)];
    tx.mutate("Logical_Router", router, add);
    lab.meddle(tx).await;
}

async fn fails_saying(lab: &Lab, told: &[&str]) {
    let before = lab.port(BEFORE).unwrap().1;
    let written = lab.make(&lab.view("w0"), &armed(), None).await;
    let Written::Failed(why) = written else {
        panic!("{written:?}");
    };
    assert!(told.iter().all(|told| why.contains(told)), "{why}");
    assert_eq!(lab.port(BEFORE).unwrap().1, before);
}

#[tokio::test]
async fn a_port_that_is_only_called_like_the_targets_is_left_alone() {
    let same = "0a:00:00:00:00:01 10.20.1.10";
    let cases = [
        ("sw-c3", same, &[][..], "switch"),
        ("sw-c2", "0a:00:00:00:00:01 10.20.1.11", &[], "addresses"),
        ("sw-c2", same, &[("segue.io/vm", "gone/w9")], "another VM"),
        (
            "sw-c2",
            same,
            &[("segue.io/source-port", "x")],
            "another VM",
        ),
    ];
    for (switch, addresses, ids, why) in cases {
        let lab = lab(&[]).await;
        let row = Row::new()
            .set("name", AFTER)
            .set("addresses", addresses)
            .set("external_ids", Datum::map(ids.iter().copied()));
        put(&lab, switch, row).await;
        let left = lab.port(AFTER).unwrap().1;
        fails_saying(&lab, &[BEFORE, AFTER, why]).await;
        assert_eq!(lab.port(AFTER).unwrap().1, left);
    }
}

#[tokio::test]
async fn a_port_stays_whose_routes_cannot_follow() {
    let doubled = lab(&[]).await;
    route(&doubled, "10.20.1.10/32", &["cluster-sw-c1"]).await;
    fails_saying(&doubled, &[BEFORE, "10.20.1.10"]).await;
    assert!(doubled.on_switch("sw-c2").is_empty());

    let disputed = lab(&[]).await;
    let row = Row::new()
        .set("name", "theirs")
        .set("addresses", "0a:00:00:00:00:09 10.20.1.10")
        .set("external_ids", Datum::map([("segue.io/vm", "other/w0")]));
    put(&disputed, "sw-c2", row).await;
    assert!(disputed.view("w0").statics.routes.is_empty());
    fails_saying(&disputed, &[BEFORE, "10.20.1.10"]).await;
}

#[tokio::test]
async fn a_route_leads_only_to_where_the_vm_has_a_port_with_the_address() {
    let lab = lab(&[]).await;
    assert_eq!(lab.view("w0").statics.gateways, texts(&["c1"]));
    let row = Row::new()
        .set("name", AFTER)
        .set("external_ids", Datum::map([("segue.io/vm", "tenant/w0")]));
    put(&lab, "sw-c2", row).await;
    assert_eq!(lab.view("w0").statics.gateways, texts(&["c1"]));
    let has = Row::new().set("addresses", "0a:00:00:00:00:01 10.20.1.10");
    let mut tx = Transaction::new();
    tx.update("Logical_Switch_Port", Condition::eq("name", AFTER), has);
    lab.meddle(tx).await;
    assert_eq!(lab.view("w0").statics.gateways, texts(&["c1", "c2"]));
}

#[tokio::test]
async fn a_route_that_leads_elsewhere_is_not_taken_over() {
    for elsewhere in [&[][..], &["cluster-join"]] {
        let lab = lab(&[]).await;
        let port = Row::new().set("output_port", Datum::set(elsewhere.iter().copied()));
        let mut tx = Transaction::new();
        let all = Condition::eq("ip_prefix", "10.20.1.10");
        tx.update("Logical_Router_Static_Route", all, port);
        lab.meddle(tx).await;
        assert!(lab.view("w0").statics.routes.is_empty(), "{elsewhere:?}");
        lab.made(&armed()).await;
    }
}

/// A node that is called otherwise than its chassis, which it names.
struct Annotated;

impl Owners for Annotated {
    fn knows(&self, _: &VmName) -> bool {
        true
    }

    fn chassis_of(&self, node: &str) -> Option<String> {
        (node == "n2").then(|| "c2".to_owned())
    }
}

#[tokio::test]
async fn a_nodes_switch_is_its_chassis_however_the_chassis_is_known() {
    let lab = lab(&[]).await;
    let ids = Row::new().set("external_ids", Datum::map([("segue.io/node", "n2")]));
    let mut tx = Transaction::new();
    tx.update("Logical_Switch", Condition::eq("name", "sw-c2"), ids);
    lab.meddle(tx).await;
    let vm = VmName::new("tenant", "w0");
    assert_eq!(lab.view("w0").statics.switch_for("c2"), None);
    let view = lab.databases.view(&vm, &BTreeSet::new(), &Annotated);
    assert!(view.statics.switch_for("c2").is_some());
}

#[tokio::test]
async fn a_handover_under_way_keeps_its_mode() {
    let lab = lab(&[]).await;
    let asked = |mode| Settings {
        deadlines: handover::Deadlines::default(),
        mode,
        flip: handover::FlipPolicy::default(),
        gate: handover::GatePolicy::default(),
    };
    let held = |mode| asked(mode).held_to(&lab.view("w0")).mode;
    let modes = [RoutingMode::AddressSets, RoutingMode::StaticRoutes];
    assert_eq!(modes.map(held), modes);
    lab.made(&armed()).await;
    assert_eq!(modes.map(held), [RoutingMode::StaticRoutes; 2]);
    lab.made(&asking("c2", None)).await;
    assert_eq!(modes.map(held), [RoutingMode::StaticRoutes; 2]);
    lab.made(&PortConfig::default()).await;
    assert_eq!(modes.map(held), modes);

    // Two chassis have the port, and a place set its address.
    let mut changed = lab.databases.replicas()[0].1.changed();
    assert!(soon(lab.keeper.keep_once(Instant::now())).await);
    while lab.view("w0").places.gateways.is_empty() {
        soon(changed.changed()).await.unwrap();
    }
    assert_eq!(
        lab.flip(&lab.view("w0"), Some("c2")).await,
        Written::Committed
    );
    let ids = Datum::map([(Mark::OWNER, "segue")]);
    let port = Condition::eq("name", AFTER);
    let marked = [Mutation::insert("external_ids", ids)];
    lab.meddle(on("Logical_Switch_Port", port, marked)).await;
    assert_eq!(modes.map(held), [RoutingMode::AddressSets; 2]);
}

/// Remembers which VMs had news.
struct Ears(tokio::sync::mpsc::UnboundedSender<VmName>);

impl Listener for Ears {
    fn vms_changed(&self, vms: BTreeSet<VmName>) {
        for vm in vms {
            self.0.send(vm).unwrap();
        }
    }
    fn world_changed(&self) {}
    fn nodes_changed(&self) {}
    fn everything_changed(&self) {}
    fn layout_changed(&self) {}
    fn addresses_left(&self) {}
    fn malformed(&self, _: Kind) {}
}

#[tokio::test]
async fn a_changed_route_is_the_news_of_whoever_has_the_address() {
    let lab = lab(&[]).await;
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let (ears, stop) = (Ears(tell), CancellationToken::new());
    let follow = lab.databases.follow_northbound(&ears, &Everybody, &stop);
    let listen = async {
        route(&lab, "10.20.1.10/32", &["cluster-sw-c2"]).await;
        assert_eq!(soon(told.recv()).await, Some(VmName::new("tenant", "w0")));
        stop.cancel();
    };
    tokio::join!(follow, listen);
}
