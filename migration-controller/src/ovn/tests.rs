//! The replicas and the writer against real servers with OVN's real schemas.

use std::collections::BTreeMap;
use std::sync::Mutex;

use handover::{
    Epoch, Expected, Mark, MigrationUid, Original, PortConfig, PortWrite, Step, VmName, Write,
};
use ovsdb_rs::{Client, Condition, Datum, Mutation, Row, Transaction};
use tokio_util::sync::CancellationToken;

use super::replica::Unmapped;
use super::server::{Server, soon};
use super::tables::{NORTHBOUND, SOUTHBOUND};
use super::writer::WRITER_LOCK;
use super::*;
use crate::cluster::{Kind, Listener};

/// Both databases, a replica of each, and a client of somebody else's.
struct Lab {
    databases: Databases,
    writer: Writer,
    other: Client,
    southbound: Client,
    _servers: [Server; 2],
}

struct Everybody;

impl Owners for Everybody {
    fn knows(&self, vm: &VmName) -> bool {
        vm.namespace == "tenant"
    }
}

fn vm() -> VmName {
    VmName::new("tenant", "w0")
}

fn strings(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|&(key, value)| (key.into(), value.into()))
        .collect()
}

fn map(pairs: &[(&str, &str)]) -> Datum {
    Datum::map(pairs.iter().copied())
}

impl Lab {
    /// With two ports of `tenant/w0`, one of them with keys of somebody else's.
    async fn start() -> Self {
        let servers = [Server::start("ovn-nb"), Server::start("ovn-sb")];
        let [nb, sb] = [servers[0].connect().await, servers[1].connect().await];
        let databases = Databases::start(&nb, &sb, None).unwrap();
        let writer = Writer::start(nb).await.unwrap();
        let lab = Self {
            databases,
            writer,
            other: servers[0].connect().await,
            southbound: servers[1].connect().await,
            _servers: servers,
        };
        let mut tx = Transaction::new();
        tx.insert("NB_Global", Row::new().set("nb_cfg", 4));
        let first = Row::new()
            .set("name", "w0.tenant")
            .set("options", map(&[("vif-plug-mtu", "1400")]))
            .set("external_ids", map(&[("foreign", "keep")]));
        let first = tx.insert("Logical_Switch_Port", first);
        let second = Row::new()
            .set("name", "labelled")
            .set("external_ids", map(&[("segue.io/vm", "tenant/w0")]));
        let second = tx.insert("Logical_Switch_Port", second);
        let ports = Datum::set([first.reference(), second.reference()]);
        tx.insert(
            "Logical_Switch",
            Row::new().set("name", "s").set("ports", ports),
        );
        lab.other.transact(NORTHBOUND, tx).await.unwrap();
        lab.until(|view| view.ports.len() == 2 && view.nb_global.is_some())
            .await;
        lab
    }

    fn view(&self) -> View {
        self.databases
            .view(&vm(), &["m-1".to_owned()].into(), &Everybody)
    }

    /// Waits until the replicas show it.
    async fn until(&self, condition: impl Fn(&View) -> bool) -> View {
        let [(_, nb), (_, sb)] = self.databases.replicas();
        let (mut nb, mut sb) = (nb.changed(), sb.changed());
        soon(async {
            loop {
                let view = self.view();
                if condition(&view) {
                    return view;
                }
                tokio::select! {
                    changed = nb.changed() => changed.unwrap(),
                    changed = sb.changed() => changed.unwrap(),
                }
            }
        })
        .await
    }

    async fn write(&self, write: &Write, view: &View) -> Written {
        soon(self.writer.write(write, view.into(), "test")).await
    }

    /// Somebody else changes a port's keys.
    async fn meddle(&self, port: &str, mutations: impl IntoIterator<Item = Mutation>) {
        let mut tx = Transaction::new();
        let rows = Condition::eq("name", port);
        tx.mutate("Logical_Switch_Port", rows, mutations);
        self.other.transact(NORTHBOUND, tx).await.unwrap();
    }
}

fn mark(epoch: u64) -> Mark {
    Mark {
        migration: MigrationUid::new("m-1"),
        epoch: Epoch(epoch),
        source: "c1".into(),
        target: "c2".into(),
        original: Original::default(),
        barrier: None,
        source_released: false,
    }
}

/// Makes every port of the view look like `config`, as a decision on it would.
fn write(view: &View, step: Step, config: &PortConfig) -> Write {
    let ports = view.ports.iter().map(|row| PortWrite {
        port: row.name.clone(),
        expected: Expected::of(&read_config(row).unwrap()),
        config: config.clone(),
    });
    Write {
        step,
        ports: ports.collect(),
        routes: Vec::new(),
        raise_nb_cfg_from: None,
    }
}

fn armed() -> PortConfig {
    PortConfig {
        requested_chassis: Some("c1,c2".into()),
        activation_strategy: Some("rarp".into()),
        mark: Some(mark(7)),
    }
}

type Columns = (String, BTreeMap<String, String>, BTreeMap<String, String>);

fn rows(view: &View) -> Vec<Columns> {
    view.ports
        .iter()
        .map(|row| {
            (
                row.name.to_string(),
                row.options.clone(),
                row.external_ids.clone(),
            )
        })
        .collect()
}

#[tokio::test]
async fn what_is_written_is_read_back_and_cleared_without_a_trace() {
    let lab = Lab::start().await;
    let before = lab.view();
    let armed = armed();
    let written = lab.write(&write(&before, Step::Arm, &armed), &before).await;
    assert_eq!(written, Written::Committed);
    // No waiting: a write that is answered is in the replica.
    let during = lab.view();
    for row in &during.ports {
        assert_eq!(read_config(row).as_ref(), Ok(&armed), "{}", row.name);
    }
    let foreign = &during.ports[1];
    assert_eq!(foreign.options["vif-plug-mtu"], "1400");
    assert_eq!(foreign.external_ids["foreign"], "keep");

    // A value that changes is replaced, not kept, and so is an optional part of the mark.
    let settled = PortConfig {
        requested_chassis: Some("c2".into()),
        activation_strategy: None,
        mark: Some(Mark {
            source_released: true,
            ..mark(7)
        }),
    };
    let written = lab
        .write(&write(&during, Step::Settle, &settled), &during)
        .await;
    assert_eq!(written, Written::Committed);
    let during = lab.view();
    assert_eq!(read_config(&during.ports[0]).as_ref(), Ok(&settled));

    let released = PortConfig::default();
    let written = lab
        .write(&write(&during, Step::Release, &released), &during)
        .await;
    assert_eq!(written, Written::Committed);
    assert_eq!(rows(&lab.view()), rows(&before));
}

#[tokio::test]
async fn a_port_that_changed_refuses_the_write_for_all_ports() {
    let meddling: [(&str, Vec<Mutation>); 4] = [
        // A key that was absent, which no condition of OVSDB's can ask for.
        (
            "absent",
            Mutation::put("options", "activation-strategy", "garp").into(),
        ),
        (
            "changed",
            Mutation::put("options", "requested-chassis", "c3").into(),
        ),
        (
            "newer handover",
            vec![Mutation::insert("external_ids", owned_map(&mark(8)))],
        ),
        (
            "gone",
            vec![Mutation::delete_keys("external_ids", ["segue.io/vm"])],
        ),
    ];
    for (what, mutations) in meddling {
        let lab = Lab::start().await;
        let stale = lab.view();
        lab.meddle("labelled", mutations).await;
        let before = lab.until(|view| rows(view) != rows(&stale)).await;
        let written = lab.write(&write(&stale, Step::Arm, &armed()), &stale).await;
        assert!(
            matches!(written, Written::Refused(_)),
            "{what}: {written:?}"
        );
        assert_eq!(rows(&lab.view()), rows(&before), "{what}");
    }
}

fn owned_map(mark: &Mark) -> Datum {
    Datum::map(mark.to_external_ids())
}

#[tokio::test]
async fn a_row_made_again_under_the_same_name_is_another_row() {
    let lab = Lab::start().await;
    let stale = lab.view();
    let mut tx = Transaction::new();
    let [first, second] = &stale.ports[..] else {
        panic!("{:?}", stale.ports);
    };
    let again = Row::new()
        .set("name", first.name.as_str())
        .set("external_ids", map(&[("segue.io/vm", "tenant/w0")]));
    let again = tx.insert("Logical_Switch_Port", again);
    let ports = Datum::set([again.reference(), second.uuid.into()]);
    tx.update(
        "Logical_Switch",
        Condition::eq("name", "s"),
        Row::new().set("ports", ports),
    );
    lab.other.transact(NORTHBOUND, tx).await.unwrap();
    let written = lab.write(&write(&stale, Step::Arm, &armed()), &stale).await;
    assert!(matches!(written, Written::Refused(_)), "{written:?}");
}

#[tokio::test]
async fn nb_cfg_is_raised_together_with_the_ports_or_not_at_all() {
    let lab = Lab::start().await;
    let stale = lab.view();
    let raise = |view: &View, from| Write {
        raise_nb_cfg_from: Some(from),
        ..write(view, Step::RaiseBarrier, &armed())
    };
    let mut tx = Transaction::new();
    tx.update(
        "NB_Global",
        ovsdb_rs::Where::all(),
        Row::new().set("nb_cfg", 9),
    );
    lab.other.transact(NORTHBOUND, tx).await.unwrap();
    let written = lab.write(&raise(&stale, 4), &stale).await;
    assert!(matches!(written, Written::Refused(_)), "{written:?}");

    let fresh = lab
        .until(|view| view.nb_global.is_some_and(|(_, nb_cfg)| nb_cfg == 9))
        .await;
    assert_eq!(rows(&fresh), rows(&stale));
    assert_eq!(
        lab.write(&raise(&fresh, 9), &fresh).await,
        Written::Committed
    );
    let after = lab.view();
    assert_eq!(after.barrier().nb_cfg, 10);
    assert_eq!(read_config(&after.ports[0]).unwrap(), armed());
}

#[tokio::test]
async fn who_lost_the_lock_writes_nothing() {
    let lab = Lab::start().await;
    let view = lab.view();
    // The database's own word counts, not what this client has heard of it by now.
    let thief = lab.other.steal(WRITER_LOCK).await.unwrap();
    let written = lab.write(&write(&view, Step::Arm, &armed()), &view).await;
    assert_eq!(written, Written::NotLeader);
    assert_eq!(rows(&lab.view()), rows(&view));
    thief.unlock().await.unwrap();
    let mut leadership = lab.writer.leadership();
    let held = leadership.wait_for(|state| *state == ovsdb_rs::LockState::Held);
    soon(held).await.unwrap();
    let written = lab.write(&write(&view, Step::Arm, &armed()), &view).await;
    assert_eq!(written, Written::Committed);
}

#[tokio::test]
async fn a_standby_takes_over_when_the_leader_goes() {
    let lab = Lab::start().await;
    let standby = Writer::start(lab.other.clone()).await.unwrap();
    assert!(lab.writer.is_leader() && !standby.is_leader());
    let view = lab.view();
    let refused = standby
        .write(&write(&view, Step::Arm, &armed()), (&view).into(), "test")
        .await;
    assert_eq!(refused, Written::NotLeader);
    lab.writer.stop().await;
    let mut leadership = standby.leadership();
    let held = leadership.wait_for(|state| *state == ovsdb_rs::LockState::Held);
    soon(held).await.unwrap();
    let written = standby
        .write(&write(&view, Step::Arm, &armed()), (&view).into(), "test")
        .await;
    assert_eq!(written, Written::Committed);
}

#[tokio::test]
async fn a_view_joins_both_databases() {
    let lab = Lab::start().await;
    let mut tx = Transaction::new();
    let mut chassis = |name: &str, remote: bool| {
        let encap = Row::new()
            .set("type", "geneve")
            .set("ip", format!("192.0.2.{}", &name[1..]))
            .set("chassis_name", name);
        let encap = tx.insert("Encap", encap);
        let config = if remote {
            map(&[("is-remote", "true")])
        } else {
            map(&[])
        };
        let row = Row::new()
            .set("name", name)
            .set("hostname", format!("host-{name}"))
            .set("other_config", config)
            .set("encaps", encap);
        let uuid = tx.insert("Chassis", row);
        let private = Row::new()
            .set("name", name)
            .set("nb_cfg", 3)
            .set("chassis", uuid);
        tx.insert("Chassis_Private", private);
        uuid
    };
    let (c1, c2) = (chassis("c1", false), chassis("c2", false));
    chassis("c9", true);
    tx.insert(
        "Chassis_Private",
        Row::new().set("name", "dead").set("nb_cfg", 1),
    );
    let datapath = tx.insert("Datapath_Binding", Row::new().set("tunnel_key", 1));
    let binding = Row::new()
        .set("logical_port", "w0.tenant")
        .set("datapath", datapath)
        .set("tunnel_key", 1)
        .set("chassis", c1)
        .set("additional_chassis", Datum::set([c2.reference()]))
        .set("options", map(&[("additional-chassis-activated", "c2,c3")]));
    tx.insert("Port_Binding", binding);
    lab.southbound.transact(SOUTHBOUND, tx).await.unwrap();

    let bound = |view: &View| view.ports.iter().any(|row| row.binding.chassis.is_some());
    let view = lab.until(bound).await;
    let port = &view.ports[1];
    assert_eq!(port.name.as_str(), "w0.tenant");
    assert_eq!(port.binding.chassis.as_deref(), Some("c1"));
    assert_eq!(port.binding.additional, ["c2"]);
    assert_eq!(port.activated, ["c2".to_owned(), "c3".to_owned()].into());
    assert_eq!(view.ports[0].binding, handover::Binding::default());
    // Neither a chassis of another zone nor one without a row of its own holds anything up.
    let applied = view.barrier().applied;
    assert_eq!(
        applied,
        BTreeMap::from([("c1".into(), 3), ("c2".into(), 3)])
    );
    let chassis = handover::Chassis::new("c1", "host-c1");
    assert_eq!(view.chassis_of("c1", &Everybody).as_ref(), Ok(&chassis));
    assert_eq!(
        view.chassis_of("host-c1", &Everybody).as_ref(),
        Ok(&chassis)
    );
    assert_eq!(view.chassis_of("c7", &Everybody), Err(Unmapped::None));
}

/// Every node names chassis `c2` as its own.
struct Annotated;

impl Owners for Annotated {
    fn knows(&self, _: &VmName) -> bool {
        false
    }

    fn chassis_of(&self, _: &str) -> Option<String> {
        Some("c2".into())
    }
}

#[tokio::test]
async fn a_nodes_chassis_is_the_one_it_names_or_the_only_one_that_is_called_like_it() {
    let lab = Lab::start().await;
    let mut tx = Transaction::new();
    for (name, hostname) in [
        ("c1", "n1"),
        ("c2", "n1"),
        ("c3", "n3.example.com"),
        ("c4", "n4.example.com"),
        ("c5", "n4.example.org"),
        ("c6", "n6"),
    ] {
        let encap = Row::new()
            .set("type", "geneve")
            .set("ip", format!("192.0.2.{}", &name[1..]))
            .set("chassis_name", name);
        let encap = tx.insert("Encap", encap);
        let row = Row::new()
            .set("name", name)
            .set("hostname", hostname)
            .set("encaps", encap);
        tx.insert("Chassis", row);
    }
    lab.southbound.transact(SOUTHBOUND, tx).await.unwrap();
    let view = lab
        .until(|view| view.chassis_of("c6", &Everybody).is_ok())
        .await;
    let name = |node: &str| view.chassis_of(node, &Everybody).map(|found| found.name);
    let several = |names: [&str; 2]| Err(Unmapped::Several(names.map(Into::into).into()));
    // A node that was installed anew has two chassis of its hostname.
    assert_eq!(name("n1").map_err(sorted), several(["c1", "c2"]));
    let named = view.chassis_of("n1", &Annotated).unwrap();
    assert_eq!(named.name, "c2", "the annotation outranks the hostname");
    assert_eq!(
        name("n3").as_deref(),
        Ok("c3"),
        "one short name, one chassis"
    );
    assert_eq!(name("n3.example.com").as_deref(), Ok("c3"));
    assert_eq!(
        name("n3.example.org"),
        Err(Unmapped::None),
        "another domain"
    );
    assert_eq!(name("n4").map_err(sorted), several(["c4", "c5"]));
    assert_eq!(name("n6.example.com").as_deref(), Ok("c6"));
    let said = name("n1").unwrap_err().to_string();
    assert!(said.contains("c1") && said.contains("annotation"), "{said}");
}

fn sorted(unmapped: Unmapped) -> Unmapped {
    match unmapped {
        Unmapped::Several(mut names) => {
            names.sort();
            Unmapped::Several(names)
        }
        Unmapped::None => Unmapped::None,
    }
}

#[tokio::test]
async fn a_marked_port_that_changed_hands_is_still_its_migrations() {
    let lab = Lab::start().await;
    let mutations = [
        Mutation::delete_keys("external_ids", ["segue.io/vm"]),
        Mutation::insert("external_ids", map(&[("segue.io/vm", "elsewhere/x")])),
        Mutation::insert("external_ids", owned_map(&mark(7))),
    ];
    lab.meddle("labelled", mutations).await;
    let moved = |view: &View| {
        let ids = |row: &PortRow| row.external_ids.get("segue.io/vm").cloned();
        view.ports
            .iter()
            .any(|row| ids(row).as_deref() == Some("elsewhere/x"))
    };
    assert_eq!(lab.until(moved).await.ports.len(), 2);
    let marked = lab.databases.marked_vms(&Everybody);
    assert_eq!(marked, [VmName::new("elsewhere", "x")].into());
}

/// Remembers what it is told.
#[derive(Default)]
struct Ears {
    vms: Mutex<std::collections::BTreeSet<VmName>>,
    heard: tokio::sync::Notify,
}

impl Listener for Ears {
    fn vms_changed(&self, vms: std::collections::BTreeSet<VmName>) {
        self.vms.lock().unwrap().extend(vms);
        self.heard.notify_one();
    }

    fn world_changed(&self) {}

    fn nodes_changed(&self) {}

    fn layout_changed(&self) {}

    fn addresses_left(&self) {}

    fn everything_changed(&self) {}

    fn malformed(&self, _: Kind) {}
}

#[tokio::test]
async fn a_changed_port_is_its_vms_news() {
    let lab = Lab::start().await;
    let (ears, stop) = (Ears::default(), CancellationToken::new());
    let follow = lab.databases.follow_northbound(&ears, &Everybody, &stop);
    let listen = async {
        lab.meddle(
            "labelled",
            Mutation::put("options", "requested-chassis", "c3"),
        )
        .await;
        soon(async {
            while !ears.vms.lock().unwrap().contains(&vm()) {
                ears.heard.notified().await;
            }
        })
        .await;
        stop.cancel();
    };
    tokio::join!(follow, listen);
    assert_eq!(*ears.vms.lock().unwrap(), [vm()].into());
}

#[test]
fn what_is_as_it_should_be_is_not_written_again() {
    let row = PortRow {
        uuid: uuid::Uuid::nil(),
        name: handover::PortName::new("p"),
        addresses: Vec::new(),
        options: strings(&[
            ("requested-chassis", "c1,c2"),
            ("activation-strategy", "rarp"),
        ]),
        external_ids: mark(7)
            .to_external_ids()
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
        binding: handover::Binding::default(),
        activated: std::collections::BTreeSet::new(),
    };
    assert!(super::writer::mutations(&row, &armed()).is_empty());
}
