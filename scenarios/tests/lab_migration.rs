//! Real guests migrate between real nodes, by OVN alone.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use scenarios::lab::{
    Guest, GuestSpec, Host, Lab, LabSpec, Quiet,
    events::{self, Event, Kind, Lifecycle},
    libvirt::{Fault, MigrateOptions, Outcome, migrate},
    topology::{SharedSwitch, Subnet},
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// The guest's logical switch ports.
const PORTS: [&str; 2] = ["vm1", "vm1.1"];

/// A guest with two interfaces on node1, reachable from the client.
struct Scene {
    lab: Lab,
    guest: Guest,
    events: UnboundedReceiver<Event>,
    _followers: Vec<events::Follower>,
}

impl Scene {
    async fn set(name: &str) -> Result<Self> {
        let spec = LabSpec {
            exe: env!("CARGO_BIN_EXE_scenarios").into(),
            ..LabSpec::new(name.parse()?)?
        };
        let lab = Lab::up(&spec, &Quiet).await?;
        let nics = [Subnet(0).nic("vm1", 10), Subnet(1).nic("vm1.1", 10)];
        lab.plug_client("eth1", &Subnet(1).client()).await?;
        for (subnet, nic) in [Subnet(0), Subnet(1)].into_iter().zip(&nics) {
            let switch = SharedSwitch::create(&lab, subnet).await?;
            switch
                .add_port(nic, &[("segue.io/vm", "default/vm1")])
                .await?;
        }
        let guest = Guest::prepare(&lab, GuestSpec::new("vm1", nics.into()))?;
        for lsp in PORTS {
            set_option(&lab, lsp, "requested-chassis=node1").await?;
        }
        guest.start(lab.host("node1")?).await?;
        let (sender, events) = unbounded_channel();
        let mut followers = Vec::new();
        for node in ["node1", "node2"] {
            followers.push(events::follow(lab.host(node)?, sender.clone()).await?);
        }
        let scene = Self {
            lab,
            guest,
            events,
            _followers: followers,
        };
        scene.installed(scene.source()?).await?;
        Ok(scene)
    }

    fn source(&self) -> Result<&Host> {
        self.lab.host("node1")
    }

    fn target(&self) -> Result<&Host> {
        self.lab.host("node2")
    }

    /// Binds the ports to both chassis; the guest's own announcement opens the target.
    async fn arm(&self) -> Result<()> {
        for lsp in PORTS {
            set_option(&self.lab, lsp, "requested-chassis=\"node1,node2\"").await?;
            set_option(&self.lab, lsp, "activation-strategy=rarp").await?;
        }
        self.guest.plug(self.target()?).await?;
        self.installed(self.target()?).await
    }

    /// Makes `node` the ports' only chassis, once the guest's interfaces are gone from `other`.
    async fn settle(&self, node: &Host, other: &Host) -> Result<()> {
        self.guest.unplug(other).await?;
        let lab = &self.lab;
        let id = lab.sbctl(["get", "Chassis", node.name(), "_uuid"]).await?;
        let (bound, chassis) = (
            format!("chassis={id}"),
            format!("requested-chassis={}", node.name()),
        );
        for lsp in PORTS {
            lab.nbctl([
                "remove",
                "Logical_Switch_Port",
                lsp,
                "options",
                "activation-strategy",
            ])
            .await?;
            set_option(lab, lsp, &chassis).await?;
            lab.sbctl(["wait-until", "Port_Binding", lsp, &bound])
                .await?;
        }
        Ok(())
    }

    /// Returns once OVN has installed the guest's interfaces on a node.
    async fn installed(&self, node: &Host) -> Result<()> {
        for nic in &self.guest.spec().nics {
            node.ovs().wait_ovn_installed(&nic.tap()).await?;
        }
        Ok(())
    }

    /// The guest answers the client on both interfaces, over both families, also packets that fill its MTU.
    async fn reachable(&self) -> Result<()> {
        let client = self.lab.host("client")?;
        for address in [
            "10.128.0.10",
            "fd00:10:128::a",
            "10.129.0.10",
            "fd00:10:129::a",
        ] {
            for payload in ["56", "1452"] {
                client
                    .run(
                        "busybox",
                        ["ping", "-c", "1", "-W", "5", "-s", payload, address],
                    )
                    .await?;
            }
        }
        Ok(())
    }

    /// The next event for which `wanted` holds.
    async fn event(&mut self, what: &str, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        let next = async {
            while let Some(event) = self.events.recv().await {
                if let Kind::Lost(why) = &event.kind {
                    bail!("{} lost: {why}", event.host);
                }
                if wanted(&event) {
                    return Ok(event);
                }
            }
            bail!("no more events")
        };
        tokio::time::timeout(Duration::from_mins(1), next)
            .await
            .context("too late")
            .flatten()
            .context(what.to_owned())
    }
}

async fn set_option(lab: &Lab, lsp: &str, option: &str) -> Result<()> {
    let option = format!("options:{option}");
    lab.nbctl(["set", "Logical_Switch_Port", lsp, &option])
        .await
        .map(drop)
}

fn lifecycle(host: &str, wanted: Lifecycle) -> impl Fn(&Event) -> bool {
    move |event| event.host == host && event.kind == Kind::Lifecycle(wanted)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn a_guest_moves_and_stays_reachable() -> Result<()> {
    let mut scene = Scene::set("tmigrate").await?;
    scene.reachable().await.context("before")?;
    scene.arm().await?;
    let job = migrate(
        scene.source()?,
        scene.target()?,
        "vm1",
        MigrateOptions::default(),
    )
    .await?;
    let stop = scene
        .event("pause", |event| {
            event.host == "node1" && event.is_monitor("STOP")
        })
        .await?;
    let resume = scene
        .event("resume", |event| {
            event.host == "node2" && event.is_monitor("RESUME")
        })
        .await?;
    scene
        .event(
            "gone",
            lifecycle("node1", Lifecycle::Stopped { migrated: true }),
        )
        .await?;
    assert_eq!(job.wait().await?, Outcome::Completed);
    let pause = resume.at.duration_since(stop.at)?;
    ensure!(pause < Duration::from_secs(5), "paused for {pause:?}");
    println!(
        "pause {pause:?}, told {:?} later",
        resume.received.duration_since(resume.at)?
    );

    scene.settle(scene.target()?, scene.source()?).await?;
    scene.reachable().await.context("after")?;
    assert!(scene.guest.runs_on(scene.target()?).await?);
    assert!(!scene.guest.runs_on(scene.source()?).await?);
    scene.lab.down().map(drop)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn a_cancelled_migration_leaves_the_guest_where_it_is() -> Result<()> {
    let mut scene = Scene::set("tcancel").await?;
    scene.arm().await?;
    let slowly = MigrateOptions {
        bandwidth_mib: Some(1),
        ..MigrateOptions::default()
    };
    let job = migrate(scene.source()?, scene.target()?, "vm1", slowly).await?;
    scene
        .event("copying", |event| {
            event.host == "node1" && event.migration_status() == Some("active")
        })
        .await?;
    job.aborter().abort().await?;
    let Outcome::Failed(why) = job.wait().await? else {
        bail!("it moved")
    };
    println!("{why}");
    assert!(scene.guest.runs_on(scene.source()?).await?);
    scene.settle(scene.source()?, scene.target()?).await?;
    scene.reachable().await?;
    scene.lab.down().map(drop)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn a_target_that_dies_at_switchover_gives_the_guest_back_to_the_source() -> Result<()> {
    let mut scene = Scene::set("tfault").await?;
    scene.arm().await?;
    let fault = MigrateOptions {
        fault: Some(Fault::TargetDiesAtSwitchover),
        ..MigrateOptions::default()
    };
    let job = migrate(scene.source()?, scene.target()?, "vm1", fault).await?;
    scene
        .event(
            "pause",
            lifecycle("node1", Lifecycle::Suspended { migrated: true }),
        )
        .await?;
    scene
        .event(
            "back",
            lifecycle("node1", Lifecycle::Resumed { migrated: true }),
        )
        .await?;
    let Outcome::Failed(why) = job.wait().await? else {
        bail!("it moved")
    };
    println!("{why}");
    assert!(scene.guest.runs_on(scene.source()?).await?);
    assert_eq!(scene.target()?.libvirt().qemu("vm1")?, None);
    scene.settle(scene.source()?, scene.target()?).await?;
    scene.reachable().await?;
    scene.lab.down().map(drop)
}
