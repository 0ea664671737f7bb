//! Guests with an address and nothing else, and gateways that move.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use scenarios::lab::{
    Guest, GuestSpec, Host, Lab, LabSpec, Neighbour, Nic, Quiet,
    isolation::{Allowed, Isolation, Protocol},
    libvirt::{MigrateOptions, Outcome, migrate},
    routed::{GATEWAY_MAC, GATEWAY4, GATEWAY6, Gateway, RoutedNetwork},
    topology::{SharedSwitch, Subnet},
};

const OUTSIDE: [&str; 2] = ["172.31.0.1", "fd00:172:31::1"];
const CLIENT: [&str; 2] = ["10.20.3.5", "fd00:10:20:3::5"];
/// The addresses of the guest on the routed network.
const GUEST: [&str; 2] = ["10.20.1.10", "fd00:10:20:1::a"];
/// Frames in one direction of an exchange that is counted; what keeps neighbours known is far less.
const COUNTED: u64 = 20;

/// A guest on node1, born there, with a routed interface and one on a shared switch.
struct Scene {
    lab: Lab,
    guest: Guest,
}

impl Scene {
    async fn set(name: &str, gateway: &Gateway) -> Result<Self> {
        let spec = LabSpec {
            exe: env!("CARGO_BIN_EXE_scenarios").into(),
            ..LabSpec::new(name.parse()?)?
        };
        let lab = Lab::up(&spec, &Quiet).await?;
        let network = RoutedNetwork::create(&lab, gateway).await?;
        let nic = network.nic("vm1", "node1", 10)?;
        let vm = ("segue.io/vm", "default/vm1");
        network.add_port(&nic, &[vm]).await?;
        let shared = SharedSwitch::create(&lab, Subnet(0)).await?;
        let second = Subnet(0).nic("vm1.1", 10);
        shared.add_port(&second, &[vm]).await?;
        let guest = Guest::prepare(&lab, GuestSpec::new("vm1", vec![nic, second]))?;
        let scene = Self { lab, guest };
        for lsp in scene.ports() {
            scene.request(lsp, "node1", None).await?;
        }
        scene.guest.start(scene.node1()?).await?;
        Ok(scene)
    }

    fn network(&self) -> RoutedNetwork<'_> {
        RoutedNetwork::attach(&self.lab)
    }

    fn node1(&self) -> Result<&Host> {
        self.lab.host("node1")
    }

    fn node2(&self) -> Result<&Host> {
        self.lab.host("node2")
    }

    fn ports(&self) -> impl Iterator<Item = &str> {
        self.guest
            .spec()
            .nics
            .iter()
            .map(|nic: &Nic| nic.lsp.as_str())
    }

    async fn request(&self, lsp: &str, chassis: &str, strategy: Option<&str>) -> Result<()> {
        let mut args = vec!["lsp-set-options".to_owned(), lsp.to_owned()];
        args.push(format!("requested-chassis={chassis}"));
        args.extend(strategy.map(|strategy| format!("activation-strategy={strategy}")));
        self.lab.nbctl(args).await.map(drop)
    }

    /// Moves the guest and its ports from node1 to node2.
    async fn migrate(&self) -> Result<()> {
        let (source, target) = (self.node1()?, self.node2()?);
        for lsp in self.ports() {
            self.request(lsp, "node1,node2", Some("rarp")).await?;
        }
        self.guest.plug(target).await?;
        for nic in &self.guest.spec().nics {
            target.ovs().wait_ovn_installed(&nic.tap()).await?;
        }
        let job = migrate(source, target, "vm1", MigrateOptions::default()).await?;
        ensure!(job.wait().await? == Outcome::Completed);
        self.guest.unplug(source).await?;
        let id = self.lab.sbctl(["get", "Chassis", "node2", "_uuid"]).await?;
        for lsp in self.ports() {
            self.request(lsp, "node2", None).await?;
            let bound = ["wait-until", "Port_Binding", lsp, &format!("chassis={id}")];
            self.lab.sbctl(bound).await?;
        }
        Ok(())
    }

    /// The guest, on `node`, reaches everybody and is reached by everybody.
    async fn reachable(&self, node: &Host) -> Result<()> {
        for peer in ["client", "outside"] {
            for address in GUEST {
                ping(self.lab.host(peer)?, address, 1).await?;
            }
        }
        ping(self.lab.host("client")?, "10.128.0.10", 1).await?;
        for address in CLIENT.into_iter().chain(OUTSIDE) {
            let command = format!("ping -c 1 -W 5 {address}");
            self.guest.run(node, &command).await?;
        }
        Ok(())
    }

    /// Which gateways carry an exchange, begun by the outside, towards the guest and back.
    async fn ways(&self, address: &str) -> Result<[BTreeSet<String>; 2]> {
        let network = self.network();
        let before = network.carried().await?;
        ping(self.lab.host("outside")?, address, COUNTED).await?;
        let mut ways = [BTreeSet::new(), BTreeSet::new()];
        for (node, after) in network.carried().await? {
            let before = before.get(&node).copied().unwrap_or_default();
            let counts = [
                after.to_guests - before.to_guests,
                after.from_guests - before.from_guests,
            ];
            for (way, count) in ways.iter_mut().zip(counts) {
                if count >= COUNTED {
                    way.insert(node.clone());
                }
            }
        }
        Ok(ways)
    }

    /// The source address with which the guest's connections arrive at the outside.
    async fn seen_outside(&self, node: &Host) -> Result<IpAddr> {
        let outside = self.lab.host("outside")?.clone();
        // Sockets belong to the network of the thread that opens them.
        let listener = thread::spawn(move || {
            outside.enter_netns()?;
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9_000)).context("listen")
        });
        let listener = listener.join().map_err(|_| anyhow!("no listener"))??;
        // The guest's end waits for this one to be closed.
        let accepted = tokio::task::spawn_blocking(move || {
            let (_, from) = listener.accept()?;
            anyhow::Ok(from.ip())
        });
        let command = format!("nc -w 5 {} 9000 </dev/null", OUTSIDE[0]);
        self.guest.run(node, &command).await?;
        accepted.await?
    }

    /// What the guest, on `node`, has found out of its gateways.
    async fn gateways(&self, node: &Host) -> Result<BTreeSet<(IpAddr, Option<String>)>> {
        let entries = self.guest.gateway_entries(node).await?;
        let told = |entry: Neighbour| (entry.address, entry.mac.map(|mac| mac.to_string()));
        Ok(entries.into_iter().map(told).collect())
    }
}

async fn ping(from: &Host, address: &str, count: u64) -> Result<()> {
    let count = count.to_string();
    let args = ["ping", "-c", &count, "-i", "0.02", "-W", "5", address];
    from.run("busybox", args).await.map(drop)
}

/// What moves outside traffic, as `docs/routed.md` has it, for the guest's addresses.
async fn write_segues_rows(lab: &Lab) -> Result<()> {
    let inside = [
        ("4", "10.20.0.0/16,100.64.0.0/24"),
        ("6", "\"fd00:10:20::/48\",\"fd98::/64\""),
    ];
    for (family, networks) in inside {
        let (name, addresses) = (
            format!("name=inside{family}"),
            format!("addresses={networks}"),
        );
        lab.nbctl(["create", "Address_Set", &name, &addresses])
            .await?;
        let destination = format!("ip{family}.dst == $inside{family}");
        policy(lab, "cluster", "1110", &destination, &["allow"]).await?;
        for node in ["node1", "node2", "node3"] {
            let name = format!("name={node}_ip{family}");
            lab.nbctl(["create", "Address_Set", &name]).await?;
        }
    }
    for (node, hop4, hop6) in [
        ("node1", "100.64.0.11", "fd98::11"),
        ("node2", "100.64.0.12", "fd98::12"),
        ("node3", "100.64.0.13", "fd98::13"),
    ] {
        let inside = format!("inport == \"gr-{node}-join\"");
        for usual in [inside.as_str(), "ct.rpl"] {
            policy(lab, &format!("gr-{node}"), "1110", usual, &["allow"]).await?;
        }
        for (family, hop) in [("4", hop4), ("6", hop6)] {
            let source = format!("ip{family}.src == ${node}_ip{family}");
            policy(lab, "cluster", "1100", &source, &["reroute", hop]).await?;
            for other in ["node1", "node2", "node3"]
                .iter()
                .filter(|other| **other != node)
            {
                let destination = format!("ip{family}.dst == ${node}_ip{family}");
                let router = format!("gr-{other}");
                policy(lab, &router, "1100", &destination, &["reroute", hop]).await?;
            }
        }
    }
    Ok(())
}

async fn policy(lab: &Lab, router: &str, priority: &str, on: &str, does: &[&str]) -> Result<()> {
    let add = ["lr-policy-add", router, priority, on];
    lab.nbctl(add.into_iter().chain(does.iter().copied()))
        .await
        .map(drop)
}

/// Puts the guest's addresses into a node's sets and takes them out of the others'.
async fn place(lab: &Lab, node: &str) -> Result<()> {
    let mut args = vec!["--wait=hv".to_owned()];
    for (family, address) in [("4", GUEST[0]), ("6", GUEST[1])] {
        for other in ["node1", "node2", "node3"] {
            let verb = if other == node { "add" } else { "remove" };
            let set = format!("{other}_ip{family}");
            args.extend(["--", verb, "Address_Set", &set, "addresses"].map(String::from));
            args.push(format!("\"{address}\""));
        }
    }
    lab.nbctl(args).await.map(drop)
}

/// A guest's gateways, whoever tells it of them.
fn both_gateways() -> BTreeSet<(IpAddr, Option<String>)> {
    let mac = Some(GATEWAY_MAC.to_string());
    BTreeSet::from([(GATEWAY4.into(), mac.clone()), (GATEWAY6.into(), mac)])
}

fn one(node: &str) -> BTreeSet<String> {
    BTreeSet::from([node.to_owned()])
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn a_guest_has_an_address_and_a_gateway_and_nothing_else() -> Result<()> {
    let scene = Scene::set("trouted", &Gateway::Ovn).await?;
    let node = scene.node1()?;
    let addresses = scene.guest.run(node, "ip addr show dev eth0").await?;
    for expected in [
        "inet 10.20.1.10/32 ",
        "inet6 fd00:10:20:1::a/128 ",
        "mtu 1400 ",
    ] {
        assert!(addresses.contains(expected), "no {expected}in {addresses}");
    }
    let routes = scene.guest.run(node, "ip route show dev eth0").await?;
    let routes: BTreeSet<_> = routes.lines().map(str::trim).collect();
    let wanted = format!("default via {GATEWAY4} dev eth0");
    assert_eq!(
        routes,
        BTreeSet::from([wanted.as_str(), "169.254.1.1 dev eth0 scope link"])
    );
    scene.reachable(node).await?;
    assert_eq!(scene.gateways(node).await?, both_gateways());

    let network = scene.network();
    let own: IpAddr = GUEST[0].parse()?;
    assert_eq!(scene.seen_outside(node).await?, own);
    network.set_snat(true).await?;
    let (gateway, _) = network.gateway_address("node1")?;
    assert_eq!(scene.seen_outside(node).await?, IpAddr::V4(gateway));
    let outside = scene.lab.host("outside")?;
    assert!(
        ping(outside, GUEST[0], 1).await.is_err(),
        "there is a way in"
    );
    network.set_snat(false).await?;
    assert_eq!(scene.seen_outside(node).await?, own);

    network.del_port("vm1").await?;
    assert_eq!(scene.lab.nbctl(["dhcp-options-list"]).await?, "");
    scene.lab.down().map(drop)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn node_ports_and_isolation_come_and_go() -> Result<()> {
    let scene = Scene::set("tservices", &Gateway::Ovn).await?;
    let (lab, network) = (&scene.lab, scene.network());
    let outside = lab.host("outside")?;
    for address in GUEST {
        let target = SocketAddr::new(address.parse()?, 7_000);
        let at = network.add_node_port("node2", 30_000, target).await?;
        connect(outside, at).await?;
    }
    network.del_node_port("node2", 30_000).await?;
    let (gateway, _) = network.gateway_address("node2")?;
    let gone = connect(outside, SocketAddr::new(gateway.into(), 30_000)).await;
    assert!(gone.is_err(), "the node port is still there");

    let client = lab.host("client")?;
    let reflector = SocketAddr::new(GUEST[0].parse()?, 7_000);
    let allowed = Allowed {
        peer: CLIENT[0].parse()?,
        protocol: Protocol::Tcp,
        port: 7_000,
    };
    let isolation = Isolation::create(lab, "vm1_only", &["vm1"], &[allowed]).await?;
    connect(client, reflector).await?;
    assert!(
        ping(client, GUEST[0], 1).await.is_err(),
        "the client may ping"
    );
    assert!(
        connect(outside, reflector).await.is_err(),
        "the outside may"
    );
    // What the guest begins itself is free.
    let command = format!("ping -c 1 -W 5 {}", OUTSIDE[0]);
    scene.guest.run(scene.node1()?, &command).await?;
    isolation.remove().await?;
    connect(outside, reflector).await?;
    scene.lab.down().map(drop)
}

async fn connect(from: &Host, to: SocketAddr) -> Result<()> {
    let (address, port) = (to.ip().to_string(), to.port().to_string());
    from.run("busybox", ["nc", "-w", "3", &address, &port])
        .await
        .map(drop)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn a_guests_way_out_moves_after_it_and_its_gateway_stays() -> Result<()> {
    let scene = Scene::set("tegress", &Gateway::Ovn).await?;
    let (node1, node2) = (scene.node1()?, scene.node2()?);
    write_segues_rows(&scene.lab).await?;
    place(&scene.lab, "node1").await?;
    scene.reachable(node1).await.context("before")?;
    let gateways = scene.gateways(node1).await?;
    assert_eq!(gateways, both_gateways());
    for address in GUEST {
        assert_eq!(scene.ways(address).await?, [one("node1"), one("node1")]);
    }

    scene.migrate().await?;
    assert_eq!(scene.gateways(node2).await?, gateways);
    scene.reachable(node2).await.context("after")?;
    assert_eq!(scene.gateways(node2).await?, gateways);
    // Its switch is another node's, and DHCP answers it all the same.
    let ask = "udhcpc -i eth0 -s /dhcp -t 5 -T 1 -n -q";
    let told = scene.guest.run(node2, ask).await?;
    assert!(told.contains("lease of 10.20.1.10 obtained"), "{told}");
    // The outside knows only the way by the gateway of birth, which passes it on.
    place(&scene.lab, "node2").await?;
    for address in GUEST {
        assert_eq!(scene.ways(address).await?, [one("node1"), one("node2")]);
    }
    scene.reachable(node2).await.context("by its new gateway")?;
    place(&scene.lab, "node1").await?;
    for address in GUEST {
        assert_eq!(scene.ways(address).await?, [one("node1"), one("node1")]);
    }
    scene.lab.down().map(drop)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn the_gateway_may_be_a_program_on_every_node() -> Result<()> {
    let scene = Scene::set("tproxy", &Gateway::ArpProxy(arp_proxy()?)).await?;
    scene.reachable(scene.node1()?).await.context("before")?;
    assert_eq!(scene.gateways(scene.node1()?).await?, both_gateways());
    scene.migrate().await?;
    let node2 = scene.node2()?;
    assert_eq!(scene.gateways(node2).await?, both_gateways());
    // Asked anew, on a node where the guest never was before.
    for flush in ["ip neigh flush dev eth0", "ip -6 neigh flush dev eth0"] {
        scene.guest.run(node2, flush).await?;
    }
    scene.reachable(node2).await.context("after")?;
    assert_eq!(scene.gateways(node2).await?, both_gateways());
    scene.lab.down().map(drop)
}

/// The program `arp-proxy`: `SEGUE_ARP_PROXY`, or what was built last.
fn arp_proxy() -> Result<PathBuf> {
    if let Some(given) = std::env::var_os("SEGUE_ARP_PROXY") {
        return Ok(given.into());
    }
    let scenarios = Path::new(env!("CARGO_BIN_EXE_scenarios"));
    let target = scenarios.ancestors().nth(2).context("target directory")?;
    let places = ["release", "debug"].map(|profile| target.join(profile).join("arp-proxy"));
    let found = places.into_iter().find(|place| place.is_file());
    found.context("`make build` makes what this test runs, or SEGUE_ARP_PROXY names it")
}
