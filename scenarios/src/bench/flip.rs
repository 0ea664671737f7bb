//! The methods that are compared, and what each must have changed in the switch.

use anyhow::{Context as _, Result, bail, ensure};
use ovsdb_rs::{Condition, Datum, Mutation, Row, Transaction};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::databases::Databases;
use super::layout::{MOVED, Node, OTHER, WATCHED, mac};
use super::world::{REROUTE, World};
use crate::lab::{Host, INTEGRATION_BRIDGE};

/// A way to write in the Northbound that a VM has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Its address moves from one node's `Address_Set` to another's: what segue does.
    AddressSet,
    /// Its port gets a second chassis and an activation strategy, or loses them.
    Lsp,
    /// The `output_port` of its /32 `Logical_Router_Static_Route` is edited in place.
    StaticRoute,
}

/// Where a flip leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// To the watched node.
    There,
    /// To where the VM was.
    Back,
}

// === impl Method ===

impl Method {
    /// Every method, the slowest last.
    pub const ALL: [Self; 3] = [Self::AddressSet, Self::Lsp, Self::StaticRoute];

    /// As it is written in results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AddressSet => "address-set",
            Self::Lsp => "lsp",
            Self::StaticRoute => "static-route",
        }
    }

    /// What is written, guarded by what must have been there, as everything is that segue writes. Rows are named by
    /// their UUIDs, which the server looks up without a search.
    pub(super) fn transaction(self, world: &World, direction: Direction) -> Result<Transaction> {
        let moved = world.moved.context("the VM that is moved does not exist")?;
        let mut tx = Transaction::new();
        match self {
            Self::AddressSet => move_address(&mut tx, world, direction)?,
            Self::Lsp => request_chassis(&mut tx, moved.port, direction),
            Self::StaticRoute => {
                let (from, to) = direction.nodes();
                let by = |node: Node| Row::new().set("output_port", node.router_port());
                tx.expect("Logical_Router_Static_Route", moved.route, by(from));
                tx.update("Logical_Router_Static_Route", moved.route, by(to));
            }
        }
        Ok(tx)
    }

    /// Checks that the watched node's switch has what the flip must have led to, and nothing of what was before. Routes
    /// and policies it must have as soon as ovn-controller says so.
    ///
    /// # Errors
    /// When it has not, with the flows that it has instead.
    pub(super) async fn check(
        self,
        databases: &mut Databases,
        node: &Host,
        direction: Direction,
    ) -> Result<()> {
        match self {
            Self::AddressSet => check_address_set(node, direction).await,
            Self::StaticRoute => check_static_route(node, direction).await,
            Self::Lsp => {
                // ovn-controller answers for what the Southbound had; that it claims or releases the port comes on top.
                databases.claimed(direction == Direction::There).await?;
                databases.settle().await?;
                check_port(node, direction).await
            }
        }
        .with_context(|| {
            format!(
                "{} says that it has followed a flip by {self}, and has not",
                node.name()
            )
        })
    }
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

// === impl Direction ===

impl Direction {
    pub(super) const ROUND: [Self; 2] = [Self::There, Self::Back];

    /// The node that the VM leaves, and the one that it comes to.
    fn nodes(self) -> (Node, Node) {
        match self {
            Self::There => (OTHER, WATCHED),
            Self::Back => (WATCHED, OTHER),
        }
    }
}

fn move_address(tx: &mut Transaction, world: &World, direction: Direction) -> Result<()> {
    const TABLE: &str = "Address_Set";
    let (from, to) = direction.nodes();
    let address = Datum::from(MOVED.address().to_string());
    let left = world.set(from)?;
    let held = [
        Condition::uuid(left),
        Condition::includes("addresses", address.clone()),
    ];
    tx.expect(TABLE, held, named(from.address_set()));
    let leave = Mutation::delete("addresses", address.clone());
    tx.mutate(TABLE, left, [leave]);
    let enter = Mutation::insert("addresses", address);
    tx.mutate(TABLE, world.set(to)?, [enter]);
    Ok(())
}

fn request_chassis(tx: &mut Transaction, port: Uuid, direction: Direction) {
    const TABLE: &str = "Logical_Switch_Port";
    let (requested, strategy) = ("requested-chassis", "activation-strategy");
    let one = [(requested, OTHER.name())];
    let two = [(requested, format!("{},{}", OTHER.name(), WATCHED.name()))];
    let (old, mut new) = match direction {
        Direction::There => (one, two.to_vec()),
        Direction::Back => (two, one.to_vec()),
    };
    if direction == Direction::There {
        new.push((strategy, "rarp".to_owned()));
    }
    let held = [
        Condition::uuid(port),
        Condition::includes("options", Datum::map(old)),
    ];
    tx.expect(TABLE, held, named(MOVED.port()));
    let cleared = Mutation::delete_keys("options", [requested, strategy]);
    let set = Mutation::insert("options", Datum::map(new));
    tx.mutate(TABLE, port, [cleared, set]);
}

/// On the cluster router, what comes from the VM leads to its gateway. On the watched node's gateway router, what goes
/// to the VM leads to its gateway too, unless this is it.
async fn check_address_set(node: &Host, direction: Direction) -> Result<()> {
    let (_, to) = direction.nodes();
    let address = MOVED.address();
    let mut outwards = flows(node, &format!("ip,nw_src={address}")).await?;
    outwards.retain(|flow| is_rerouting(flow));
    lead(&outwards, &next_hop(to))?;
    let mut inwards = flows(node, &format!("ip,nw_dst={address}")).await?;
    inwards.retain(|flow| is_rerouting(flow));
    if to == WATCHED {
        none(&inwards)
    } else {
        lead(&inwards, &next_hop(to))
    }
}

/// On the cluster router, what goes to the VM leaves by the port to its node's switch.
async fn check_static_route(node: &Host, direction: Direction) -> Result<()> {
    let (_, to) = direction.nodes();
    let mut routed = flows(node, &format!("ip,nw_dst={}", MOVED.address())).await?;
    routed.retain(|flow| !is_rerouting(flow));
    lead(&routed, &format!("{}->eth_src", mac(to.router_address())))
}

/// While the port has a second chassis, and the guest has not announced itself, the interface there is shut.
async fn check_port(node: &Host, direction: Direction) -> Result<()> {
    let ofport = node.ovs().ofport(&MOVED.port()).await?;
    let flows = flows(node, &format!("in_port={ofport}")).await?;
    match direction {
        Direction::There => ensure!(
            flows.iter().any(|flow| flow.ends_with("actions=drop")),
            "a flow that shuts the interface was expected, the switch has {flows:#?}"
        ),
        Direction::Back => none(&flows)?,
    }
    Ok(())
}

fn named(name: String) -> Row {
    Row::new().set("name", name)
}

/// The next hop to a node's gateway as it stands in an action.
fn next_hop(node: Node) -> String {
    format!("{:#x}", u32::from(node.next_hop()))
}

/// The flows of a node's integration bridge that match at least this closely, as `ovs-ofctl` writes them.
async fn flows(node: &Host, matching: &str) -> Result<Vec<String>> {
    // With OpenFlow 1.5 every action on a field is written `set_field:VALUE->FIELD`.
    let args = [
        "-OOpenFlow15",
        "--no-stats",
        "dump-flows",
        INTEGRATION_BRIDGE,
        matching,
    ];
    let dump = node.run("ovs-ofctl", args).await?;
    let flows = dump.lines().map(|line| line.trim().to_owned());
    Ok(flows.filter(|line| !line.is_empty()).collect())
}

/// Flows that come of policies, OpenFlow priorities being those of the policies.
fn is_rerouting(flow: &str) -> bool {
    flow.contains(&format!("priority={REROUTE},"))
}

/// Checks that there is one flow, and that it leads there. Where it leads is in its actions:
/// matches write addresses in another notation.
fn lead(flows: &[String], to: &str) -> Result<()> {
    match flows {
        [flow] if flow.contains(to) => Ok(()),
        _ => bail!("one flow with {to} was expected, the switch has {flows:#?}"),
    }
}

/// Checks that there is no flow.
fn none(flows: &[String]) -> Result<()> {
    ensure!(
        flows.is_empty(),
        "no flow was expected, the switch has {flows:#?}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const REROUTED: &str = "cookie=0x5f1e75dd, table=25, priority=1100,ip,metadata=0x1f,nw_src=10.66.0.10 \
        actions=set_field:0x64400003000000000000000000000000/0xffffffff000000000000000000000000->xxreg0,\
        set_field:0a:58:64:40:00:01->eth_src,set_field:0xd->reg15,resubmit(,26)";

    #[test]
    fn a_flow_to_the_wrong_gateway_is_not_taken_for_the_right_one() {
        let flows = [REROUTED.to_owned()];
        assert!(is_rerouting(REROUTED));
        lead(&flows, &next_hop(OTHER)).unwrap();
        let error = lead(&flows, &next_hop(WATCHED)).unwrap_err().to_string();
        assert!(error.contains("nw_src=10.66.0.10"), "{error}");
    }

    #[test]
    fn a_flow_too_many_or_too_few_is_noticed() {
        let flow = REROUTED.to_owned();
        assert!(lead(&[], &next_hop(OTHER)).is_err());
        assert!(lead(&[flow.clone(), flow.clone()], &next_hop(OTHER)).is_err());
        assert!(none(&[flow]).is_err());
    }
}
