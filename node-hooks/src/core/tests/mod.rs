//! The state machine, input by input.

mod commands;
mod observations;
mod partial;
mod places;
mod properties;
mod reopening;

use node_hooks_api::agent::{
    self, Announce, Arm, Disarm, HandoverId, HostRoutes, Open, Outcome, Port, Signal,
};

use super::*;
use crate::ear::Heard;
use crate::openflow::PacketOuts;
use crate::ovs::Interface;
use crate::signals::{Origin, Sign};

const MAC: Mac = pnet_base::MacAddr(0x52, 0x54, 0, 0, 0, 1);
const OTHER_MAC: Mac = pnet_base::MacAddr(0x52, 0x54, 0, 0, 0, 2);
const SECOND: Duration = Duration::from_secs(1);

/// A state machine with a clock of its own.
struct Bench {
    core: Core,
    now: Instant,
}

impl Bench {
    /// With a controller and the interface `tap1` of port `p1`.
    fn new() -> Self {
        let mut bench = Self::without_controller();
        bench.does(Input::Linked);
        bench
    }

    fn without_controller() -> Self {
        let mut bench = Self {
            core: Core::default(),
            now: Instant::now(),
        };
        bench.does(interfaces(&[("p1", "tap1", Some(7))]));
        bench
    }

    fn does(&mut self, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        self.core.handle(input, self.now, &mut out);
        out
    }

    /// What it tells the controller of it.
    fn says(&mut self, input: Input) -> Vec<from_agent::Message> {
        said(&self.does(input))
    }

    fn passes(&mut self, time: Duration) -> Vec<Output> {
        self.now += time;
        self.does(Input::Tick)
    }

    /// Its Outcome's result.
    fn result(&mut self, message: to_agent::Message) -> Option<outcome::Result> {
        let said = self.says(command(message));
        outcomes(&said).first().map(Outcome::result)
    }
}

fn said(out: &[Output]) -> Vec<from_agent::Message> {
    let said = out.iter().filter_map(|output| match output {
        Output::Say(message) => Some(message.clone()),
        _ => None,
    });
    said.collect()
}

fn outcomes(said: &[from_agent::Message]) -> Vec<Outcome> {
    let outcomes = said.iter().filter_map(|message| match message {
        from_agent::Message::Outcome(outcome) => Some(outcome.clone()),
        _ => None,
    });
    outcomes.collect()
}

fn signals(said: &[from_agent::Message]) -> Vec<(Kind, Source)> {
    let signals = said.iter().filter_map(|message| match message {
        from_agent::Message::Signal(signal) => Some((signal.kind(), signal.source())),
        _ => None,
    });
    signals.collect()
}

fn id(epoch: u64) -> HandoverId {
    HandoverId {
        namespace: "demo".into(),
        vm: "web".into(),
        migration_uid: format!("m-{epoch}"),
        epoch,
    }
}

fn port(name: &str) -> Port {
    Port {
        name: name.into(),
        mac: MAC.to_string(),
        addresses: vec!["10.0.0.1".into()],
    }
}

fn arm(epoch: u64, side: agent::Side) -> Arm {
    Arm {
        id: Some(id(epoch)),
        side: side.into(),
        ports: vec![port("p1")],
        domain: String::new(),
        routes: None,
        guest_here: None,
    }
}

fn arm_target(epoch: u64) -> Input {
    command(to_agent::Message::Arm(arm(epoch, agent::Side::Target)))
}

fn arm_source(epoch: u64) -> Input {
    command(to_agent::Message::Arm(arm(epoch, agent::Side::Source)))
}

fn disarm(epoch: u64, stays: bool) -> to_agent::Message {
    to_agent::Message::Disarm(Disarm {
        id: Some(id(epoch)),
        stays,
    })
}

fn open(epoch: u64, command: u64) -> to_agent::Message {
    to_agent::Message::Open(Open {
        id: Some(id(epoch)),
        command,
        paused_at_ns: 40,
        heard_at_ns: 41,
    })
}

fn announce(epoch: u64, command: u64) -> to_agent::Message {
    to_agent::Message::Announce(Announce {
        id: Some(id(epoch)),
        command,
    })
}

fn command(message: to_agent::Message) -> Input {
    Input::Command {
        message,
        received: Nanos(50),
    }
}

/// These interfaces, which are taps.
fn interfaces(all: &[(&str, &str, Option<u32>)]) -> Input {
    let interface = |(port, name, ofport): &(&str, &str, Option<u32>)| {
        let interface = Interface {
            name: (*name).to_owned(),
            ofport: *ofport,
            installed: true,
            is_tap: true,
            ..Interface::default()
        };
        ((*port).to_owned(), interface)
    };
    Input::Interfaces(Arc::new(all.iter().map(interface).collect()))
}

fn lifecycle(sign: Sign, origin: Origin) -> Input {
    Input::Lifecycle(LifecycleEvent {
        domain: "demo_web".into(),
        sign,
        origin,
        at: Nanos(10),
        seen: Nanos(11),
    })
}

fn libvirt(sign: Sign) -> Input {
    lifecycle(sign, Origin::Libvirt)
}

fn frame(interface: &str, heard: Heard, mac: Mac) -> Input {
    Input::Heard(HeardFrame {
        interface: interface.into(),
        mac,
        heard,
        own_mac: mac == MAC,
        at: Nanos(20),
        seen: Nanos(21),
    })
}

fn opened_frames(out: &[Output]) -> Vec<(Ticket, Arc<PacketOuts>)> {
    let opened = out.iter().filter_map(|output| match output {
        Output::Open { ticket, frames, .. } => Some((ticket.clone(), frames.clone())),
        _ => None,
    });
    opened.collect()
}

fn written() -> Written {
    Written {
        received: Nanos(50),
        sent: Nanos(60),
        processed: Some(Nanos(70)),
    }
}
