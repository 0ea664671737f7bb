//! Both databases: writing to them, and watching how far what was written has got.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ovsdb_rs::{
    Client, ClientOptions, Condition, Endpoints, Mutation, Mutator, Replica, Snapshot, Transaction,
    Where,
};
use uuid::Uuid;

use super::layout::{MOVED, WATCHED};
use crate::lab::Lab;

pub(super) const NORTH: &str = "OVN_Northbound";
pub(super) const SOUTH: &str = "OVN_Southbound";

/// The largest world takes northd and ovn-controller minutes.
const DEADLINE: Duration = Duration::from_mins(30);

ovsdb_rs::table! {
    #[derive(Eq)]
    struct NbGlobal in "NB_Global" {
        nb_cfg: i64,
        sb_cfg: i64,
    }

    #[derive(Eq)]
    struct ChassisPrivate in "Chassis_Private" {
        nb_cfg: i64,
    }

    #[derive(Eq)]
    struct PortBinding in "Port_Binding" {
        additional_chassis: Vec<Uuid>,
    }
}

/// Both databases of a lab. Nobody else may write `NB_Global.nb_cfg` meanwhile.
///
/// Writing and watching have connections of their own: what the servers send to one is never queued behind the other's.
pub(super) struct Databases {
    pub(super) north: Client,
    pub(super) south: Client,
    north_seen: Replica,
    south_seen: Replica,
    /// The number of the last change.
    number: i64,
}

/// How long a change took, each counted from the moment before it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Times {
    /// Until the Northbound server acknowledged it.
    pub(super) commit: Duration,
    /// Until northd said that the Southbound server has all that follows from it.
    pub(super) sb: Duration,
    /// Until the watched node's ovn-controller said that its switch has confirmed the flows.
    pub(super) flows: Duration,
}

impl Times {
    pub(super) fn longest(self) -> Duration {
        self.commit.max(self.sb).max(self.flows)
    }
}

impl Databases {
    /// Connects, and follows how far northd and the watched node are.
    pub(super) async fn connect(lab: &Lab) -> Result<Self> {
        let (nb, sb) = (lab.nb_endpoint(), lab.sb_endpoint());
        let north_seen = Replica::builder(NORTH)
            .table::<NbGlobal>()
            .start(&connect(&nb).await?)?;
        let watched = Condition::eq("name", WATCHED.name());
        let moved = Condition::eq("logical_port", MOVED.port());
        let south_seen = Replica::builder(SOUTH)
            .table_where::<ChassisPrivate>([watched])
            .table_where::<PortBinding>([moved])
            .start(&connect(&sb).await?)?;
        let seen = north_seen.wait_synced().await.context("the Northbound")?;
        south_seen.wait_synced().await.context("the Southbound")?;
        let (_, global) = seen
            .iter::<NbGlobal>()
            .next()
            .context("the Northbound has no NB_Global")?;
        Ok(Self {
            north: connect(&nb).await?,
            south: connect(&sb).await?,
            north_seen,
            south_seen,
            number: global.nb_cfg,
        })
    }

    /// Commits a change together with the next configuration number, and waits until that number has come out at the
    /// other end (ovn-architecture(7), Information Flow in OVN).
    ///
    /// # Errors
    /// When one of the three does not happen within half an hour, or somebody else numbers changes too.
    pub(super) async fn commit(&mut self, mut change: Transaction) -> Result<Times> {
        let number = self.number + 1;
        change.mutate(
            "NB_Global",
            Where::all(),
            [Mutation::new("nb_cfg", Mutator::Add, 1)],
        );
        let numbered = change.select("NB_Global", Where::all(), ["nb_cfg", "sb_cfg"]);
        let start = Instant::now();
        let commit = async {
            let reply = self.north.transact(NORTH, change).await?;
            Ok((reply, start.elapsed()))
        };
        let in_southbound = |seen: &Snapshot| {
            let mut rows = seen.iter::<NbGlobal>();
            rows.next().is_some_and(|(_, row)| row.sb_cfg >= number)
        };
        let in_switch = |seen: &Snapshot| {
            let mut rows = seen.iter::<ChassisPrivate>();
            rows.next().is_some_and(|(_, row)| row.nb_cfg >= number)
        };
        let watched = WATCHED.name();
        let ((reply, commit), sb, flows) = tokio::try_join!(
            commit,
            when(&self.north_seen, start, "northd", in_southbound),
            when(&self.south_seen, start, &watched, in_switch),
        )?;
        let written = reply.rows::<NbGlobal>(numbered)?;
        ensure!(
            matches!(written.as_slice(), [(_, row)] if row.nb_cfg == number),
            "somebody else writes NB_Global.nb_cfg: {written:?} where {number} was expected"
        );
        self.number = number;
        Ok(Times { commit, sb, flows })
    }

    /// Waits until nothing is under way.
    pub(super) async fn settle(&mut self) -> Result<Times> {
        self.commit(Transaction::new()).await
    }

    /// Waits until the moved VM's port has a second chassis, or has none.
    pub(super) async fn claimed(&self, wanted: bool) -> Result<()> {
        let holds = |seen: &Snapshot| {
            let mut rows = seen.iter::<PortBinding>();
            rows.next()
                .is_some_and(|(_, row)| row.additional_chassis.is_empty() != wanted)
        };
        when(&self.south_seen, Instant::now(), &WATCHED.name(), holds)
            .await
            .map(drop)
    }
}

async fn connect(endpoint: &str) -> Result<Client> {
    let endpoints: Endpoints = endpoint.parse().context("the lab's endpoint")?;
    let options = ClientOptions {
        call_timeout: DEADLINE,
        // A server that takes in the flows of a large world answers nobody meanwhile.
        probe_interval: Duration::from_mins(5),
        ..ClientOptions::default()
    };
    Client::connect(endpoints, options)
        .await
        .with_context(|| format!("connect to {endpoint}"))
}

/// How long after `start` a replica's contents were so.
async fn when(
    replica: &Replica,
    start: Instant,
    who: &str,
    holds: impl Fn(&Snapshot) -> bool,
) -> Result<Duration> {
    let looking = async {
        let mut changed = replica.changed();
        while !holds(&replica.snapshot()) {
            changed.changed().await.context("the connection ended")?;
        }
        Ok(start.elapsed())
    };
    tokio::time::timeout(DEADLINE, looking)
        .await
        .with_context(|| format!("{who} did not follow within {} s", DEADLINE.as_secs()))?
}
