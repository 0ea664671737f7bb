//! Which interfaces there are, as they come and go.

use std::io;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use netlink_packet_route::link::{LinkAttribute, LinkLayerType, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// How long to wait before asking a kernel again that has refused to tell.
const RETRY: Duration = Duration::from_secs(1);

/// An Ethernet interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// The kernel's number for it, which outlives a change of its name and is not soon used again.
    pub(crate) index: u32,
    /// Its name.
    pub(crate) name: String,
}

/// What became known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LinkEvent {
    /// All there are; others there are not.
    Listed(Vec<Link>),
    /// One is new, or has another name.
    Changed(Link),
    /// One has left this network namespace, or never was Ethernet.
    Gone(u32),
}

/// The kernel does not tell.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("cannot open a netlink socket")]
    Open(#[source] io::Error),
    #[error("cannot list the interfaces")]
    List(#[source] rtnetlink::Error),
    #[error("the netlink socket was closed")]
    Closed,
    /// Nobody listens any more.
    #[error("stopped")]
    Stopped,
}

/// A message of the kernel's, as far as it matters.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Event(LinkEvent),
    /// Messages were lost: the list must be had anew.
    Overrun,
    Nothing,
}

/// Tells `events` of everything from now on, for as long as somebody listens, across whatever fails.
pub(crate) async fn follow(events: mpsc::Sender<LinkEvent>) {
    loop {
        match follow_once(&events).await {
            Ok(()) | Err(Error::Stopped) => return,
            Err(error) => {
                tracing::warn!(error = %crate::chain(&error), "following interfaces; starting over");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn follow_once(events: &mpsc::Sender<LinkEvent>) -> Result<(), Error> {
    let (connection, handle, mut messages) =
        new_multicast_connection(&[MulticastGroup::Link]).map_err(Error::Open)?;
    let _running = AbortOnDrop(tokio::spawn(connection).abort_handle());
    // Subscribed first, listed second: what changes in between is told twice, and not missed.
    tell(events, LinkEvent::Listed(list(&handle).await?)).await?;
    while let Some((message, _)) = messages.next().await {
        match interpret(message) {
            Told::Event(event) => tell(events, event).await?,
            Told::Overrun => {
                tracing::info!(
                    "interfaces changed faster than could be followed; listing them anew"
                );
                tell(events, LinkEvent::Listed(list(&handle).await?)).await?;
            }
            Told::Nothing => {}
        }
    }
    Err(Error::Closed)
}

async fn tell(events: &mpsc::Sender<LinkEvent>, event: LinkEvent) -> Result<(), Error> {
    events.send(event).await.map_err(|_| Error::Stopped)
}

async fn list(handle: &Handle) -> Result<Vec<Link>, Error> {
    let messages: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(Error::List)?;
    Ok(messages.into_iter().filter_map(link).collect())
}

fn interpret(message: NetlinkMessage<RouteNetlinkMessage>) -> Told {
    match message.payload {
        NetlinkPayload::Overrun(_) => Told::Overrun,
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message))
            if is_about_the_link(&message) =>
        {
            let index = message.header.index;
            Told::Event(link(message).map_or(LinkEvent::Gone(index), LinkEvent::Changed))
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message))
            if is_about_the_link(&message) =>
        {
            Told::Event(LinkEvent::Gone(message.header.index))
        }
        _ => Told::Nothing,
    }
}

/// Bridges tell by the same messages, of their own family, that an interface has become or ceased to be their port.
fn is_about_the_link(message: &LinkMessage) -> bool {
    message.header.interface_family == AddressFamily::Unspec
}

/// None if it is not Ethernet.
fn link(message: LinkMessage) -> Option<Link> {
    let index = message.header.index;
    if message.header.link_layer_type != LinkLayerType::Ether {
        return None;
    }
    let name = message.attributes.into_iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute {
            Some(name)
        } else {
            None
        }
    })?;
    Some(Link { index, name })
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::NetlinkHeader;

    use super::*;

    fn message(layer: LinkLayerType, family: AddressFamily) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.header.link_layer_type = layer;
        message.header.interface_family = family;
        message.attributes = vec![LinkAttribute::IfName("tap7".to_owned())];
        message
    }

    fn told(payload: NetlinkPayload<RouteNetlinkMessage>) -> Told {
        interpret(NetlinkMessage::new(NetlinkHeader::default(), payload))
    }

    fn new_link(message: LinkMessage) -> Told {
        told(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(
            message,
        )))
    }

    fn del_link(message: LinkMessage) -> Told {
        told(NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(
            message,
        )))
    }

    #[test]
    fn ethernet_interfaces_come_and_go() {
        let ethernet = || message(LinkLayerType::Ether, AddressFamily::Unspec);
        let link = Link {
            index: 7,
            name: "tap7".to_owned(),
        };
        assert_eq!(new_link(ethernet()), Told::Event(LinkEvent::Changed(link)));
        assert_eq!(del_link(ethernet()), Told::Event(LinkEvent::Gone(7)));
    }

    #[test]
    fn others_do_not_count() {
        let loopback = message(LinkLayerType::Loopback, AddressFamily::Unspec);
        assert_eq!(new_link(loopback), Told::Event(LinkEvent::Gone(7)));
    }

    #[test]
    fn leaving_a_bridge_is_not_leaving() {
        let port = || message(LinkLayerType::Ether, AddressFamily::Bridge);
        assert_eq!(del_link(port()), Told::Nothing);
        assert_eq!(new_link(port()), Told::Nothing);
    }

    #[test]
    fn an_overrun_asks_for_a_new_list() {
        assert_eq!(told(NetlinkPayload::Overrun(Vec::new())), Told::Overrun);
    }

    #[tokio::test]
    async fn the_first_event_is_the_list() {
        let (sender, mut events) = mpsc::channel(16);
        let following = tokio::spawn(follow(sender));
        let first = events.recv().await.unwrap();
        // Loopback is in every namespace and no Ethernet.
        let LinkEvent::Listed(links) = first else {
            panic!("{first:?}")
        };
        assert!(links.iter().all(|link| link.name != "lo"), "{links:?}");
        following.abort();
    }
}
