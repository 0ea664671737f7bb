//! Static routes that others own, in networks with a port for every pod.

use handover::{Epoch, Expected, Mark, MigrationUid, Original, PortConfig, PortName, PortWrite};

use super::*;
use crate::ovn::{Basis, LogicalSwitch, LogicalSwitchPort, PortRow, Target, read_config, shown};

const BEFORE: &str = "tenant_virt-launcher-w0-a";
const AFTER: &str = "tenant_virt-launcher-w0-b";

/// A guest's port on the switch of node `sw-c1`, in a port group, with the route to it.
async fn lab(ids: &[(&'static str, &'static str)]) -> Lab {
    let mut plan = Plan::cluster(&DUAL[..2]);
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
    for (chassis, ip) in [("c1", "192.0.2.1"), ("c2", "192.0.2.2")] {
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
    while lab.view("w0").chassis("c2").is_none() {
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
    fn port(&self, name: &str) -> Option<(uuid::Uuid, Arc<LogicalSwitchPort>)> {
        let rows = self.nb().rows::<LogicalSwitchPort>();
        rows.into_iter().find(|(_, row)| row.name == name)
    }

    /// Names of the ports on a switch, less those of routers.
    fn on_switch(&self, switch: &str) -> Vec<String> {
        let nb = self.nb();
        let rows = nb.rows::<LogicalSwitch>();
        let found = rows.iter().find(|(_, row)| row.name == switch).unwrap();
        let ports = found.1.ports.iter();
        let ports = ports.filter_map(|uuid| nb.get::<LogicalSwitchPort>(uuid));
        let machines = ports.filter(|port| port.r#type.is_empty());
        machines.map(|port| port.name.clone()).collect()
    }

    /// Names of the ports in the port group.
    async fn group(&self) -> BTreeSet<String> {
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

    fn output_port(&self) -> Option<String> {
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
        let target = Target {
            vm: VmName::new("tenant", "w0"),
            pods: ("virt-launcher-w0-a".into(), "virt-launcher-w0-b".into()),
            switch: view.switch_for("sw-c2").unwrap(),
        };
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
    assert_eq!(target.options["iface-id-ver"], "7");
    assert_eq!(target.external_ids["foreign"], "x");
    assert_eq!(lab.group().await, texts(&[BEFORE, AFTER]));

    let mut waiting = armed();
    waiting.mark.as_mut().unwrap().barrier = Some(5);
    lab.made(&waiting).await;

    lab.made(&asking("c2", None)).await;
    assert!(lab.on_switch("sw-c1").is_empty());
    lab.made(&PortConfig::default()).await;
    let target = lab.port(AFTER).unwrap().1;
    assert_eq!(target.options, before.options);
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
    let before = lab.port(BEFORE).unwrap().1;
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
    assert_eq!(lab.port(AFTER).unwrap().1.options, before.options);
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
