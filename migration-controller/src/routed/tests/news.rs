//! Which changes concern the layout.

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::*;

#[derive(Debug, PartialEq)]
enum Told {
    Vms,
    Layout,
}

struct Ear(mpsc::UnboundedSender<Told>);

impl Listener for Ear {
    fn vms_changed(&self, vms: BTreeSet<VmName>) {
        if !vms.is_empty() {
            let _ = self.0.send(Told::Vms);
        }
    }
    fn world_changed(&self) {}
    fn nodes_changed(&self) {}
    fn everything_changed(&self) {}
    fn layout_changed(&self) {
        let _ = self.0.send(Told::Layout);
    }
    fn addresses_left(&self) {}
    fn malformed(&self, _: Kind) {}
}

/// A switch gets a port.
fn plug(row: Row) -> Transaction {
    let mut tx = Transaction::new();
    let port = tx.insert("Logical_Switch_Port", row);
    let put = [Mutation::insert("ports", port)];
    tx.mutate("Logical_Switch", Condition::eq("name", "sw-c1"), put);
    tx
}

#[tokio::test]
async fn machines_that_come_and_go_are_no_news_of_the_layout() {
    let lab = Lab::start(Plan::cluster(&DUAL[..1])).await;
    let (tell, mut told) = mpsc::unbounded_channel();
    let (ear, stop) = (Ear(tell), CancellationToken::new());
    let follow = lab.databases.follow_northbound(&ear, &Everybody, &stop);
    let check = async {
        let (_, before) = lab.databases.topology().unwrap();
        let port = Row::new()
            .set("name", "w1.tenant")
            .set("addresses", "0a:00:00:00:00:01 10.20.1.9");
        lab.meddle(plug(port)).await;
        assert_eq!(soon(told.recv()).await, Some(Told::Vms));
        let (_, after) = lab.databases.topology().unwrap();
        assert!(Arc::ptr_eq(&before, &after), "nothing is computed anew");
        let cluster = Condition::eq("name", "cluster");
        let route = Row::new()
            .set("ip_prefix", "10.20.1.77")
            .set("nexthop", "10.20.1.77");
        let mut tx = Transaction::new();
        let route = tx.insert("Logical_Router_Static_Route", route);
        let put = [Mutation::insert("static_routes", route)];
        tx.mutate("Logical_Router", cluster, put);
        lab.meddle(tx).await;
        let port = Condition::eq("name", "w1.tenant");
        let moved = [Mutation::insert("addresses", "0a:00:00:00:00:02 10.20.1.8")];
        lab.meddle(on("Logical_Switch_Port", port, moved)).await;
        assert_eq!(soon(told.recv()).await, Some(Told::Vms), "not of the route");
        let (_, after) = lab.databases.topology().unwrap();
        assert!(Arc::ptr_eq(&before, &after), "nothing is computed anew");

        let peer = Row::new().set("name", "new").set("type", "router");
        lab.meddle(plug(peer)).await;
        assert_eq!(soon(told.recv()).await, Some(Told::Layout));
        let switch = Condition::eq("name", "sw-c1");
        let mut tx = Transaction::new();
        tx.update("Logical_Switch", switch, Row::new().set("name", "other"));
        lab.meddle(tx).await;
        assert_eq!(soon(told.recv()).await, Some(Told::Layout));
        let (_, after) = lab.databases.topology().unwrap();
        assert_ne!(before, after);
        stop.cancel();
    };
    tokio::join!(follow, check);
}
