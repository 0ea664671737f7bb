//! An outage of the client's link, with a count of what it cost.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::sleep;

use crate::lab::Host;

const TABLE: &str = "netdev segue_outage";

/// How many of the probe's packets were dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dropped {
    pub to_vm: u64,
    pub from_vm: u64,
}

/// Drops everything on the client's first interface for about this long, both ways, and says
/// exactly how many packets of the probe (UDP port `port` at the VM) that cost.
///
/// Both ways are dropped at the client: Open vSwitch's userspace datapath reads frames at the other
/// end before any hook sees them. A sender is not told, the hook counts as a full queue to it.
pub(super) async fn drop_for(client: &Host, port: u16, time: Duration) -> Result<Dropped> {
    let ways = [
        ("to_vm", "egress", "dport"),
        ("from_vm", "ingress", "sport"),
    ];
    let hooks = ways.map(|(way, hook, _)| {
        format!(
            "add counter {TABLE} {way}; add chain {TABLE} {way} \
             {{ type filter hook {hook} device \"eth0\" priority 0; }}"
        )
    });
    let rules = ways.map(|(way, _, field)| {
        format!(
            "add rule {TABLE} {way} udp {field} {port} counter name {way} drop; \
             add rule {TABLE} {way} drop"
        )
    });
    nft(client, &format!("add table {TABLE}; {}", hooks.join("; "))).await?;
    // One transaction: both ways begin at the same time.
    nft(client, &rules.join("; ")).await?;
    sleep(time).await;
    // The outage ends first, then the counters stand still.
    nft(client, &format!("flush table {TABLE}")).await?;
    let dropped = Dropped {
        to_vm: count(client, "to_vm").await?,
        from_vm: count(client, "from_vm").await?,
    };
    nft(client, &format!("delete table {TABLE}")).await?;
    Ok(dropped)
}

async fn nft(host: &Host, commands: &str) -> Result<String> {
    host.run("nft", [commands]).await.context("nft")
}

async fn count(host: &Host, counter: &str) -> Result<u64> {
    let text = nft(host, &format!("list counter {TABLE} {counter}")).await?;
    packets_in(&text).with_context(|| format!("no count in {text:?}"))
}

fn packets_in(text: &str) -> Option<u64> {
    let mut words = text
        .split_whitespace()
        .skip_while(|word| *word != "packets");
    words.nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::packets_in;

    #[test]
    fn counters_are_read_as_nft_prints_them() {
        let text = "table netdev t {\n\tcounter to_vm {\n\t\tpackets 137 bytes 21372\n\t}\n}\n";
        assert_eq!(packets_in(text), Some(137));
        assert_eq!(packets_in("table netdev t {}"), None);
    }
}
