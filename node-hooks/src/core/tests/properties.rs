//! Whatever comes in, in whatever order.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const VMS: [&str; 2] = ["web", "db"];

/// What a handover that was armed asked for, as the test believes.
#[derive(Clone, Debug)]
struct Believed {
    id: HandoverId,
    target: bool,
    ports: Vec<Port>,
}

/// What the test believes, from inputs and from what was accepted.
#[derive(Default)]
struct Model {
    armed: BTreeMap<String, Believed>,
    newest: BTreeMap<String, u64>,
    listening: BTreeSet<String>,
    warm: bool,
    expected: BTreeSet<u16>,
    interfaces: Arc<Interfaces>,
}

fn handover() -> impl Strategy<Value = HandoverId> {
    (0..VMS.len(), 1u64..4, 0u8..2).prop_map(|(vm, epoch, uid)| HandoverId {
        namespace: "demo".into(),
        vm: VMS[vm].into(),
        migration_uid: format!("m-{epoch}-{uid}"),
        epoch,
    })
}

fn ports() -> impl Strategy<Value = Vec<Port>> {
    let port = (0u8..3, 1u8..3).prop_map(|(number, mac)| Port {
        name: format!("p{number}"),
        mac: format!("52:54:00:00:00:0{mac}"),
        addresses: vec![format!("10.0.0.{mac}")],
    });
    vec(port, 0..3)
}

fn arming() -> impl Strategy<Value = to_agent::Message> {
    let parts = (handover(), 0..3i32, ports(), any::<bool>(), any::<bool>());
    parts.prop_map(|(id, side, ports, routes, renamed)| {
        to_agent::Message::Arm(Arm {
            id: Some(id),
            side,
            ports,
            domain: if renamed {
                "machine".into()
            } else {
                String::new()
            },
            routes: Some(HostRoutes { wanted: routes }),
        })
    })
}

fn commands() -> impl Strategy<Value = to_agent::Message> {
    let with = |make: fn(HandoverId, u64) -> to_agent::Message| {
        (handover(), 1u64..9).prop_map(move |(id, number)| make(id, number))
    };
    prop_oneof![
        4 => arming(),
        2 => with(|id, number| to_agent::Message::Disarm(Disarm {
            id: Some(id),
            stays: number % 2 == 0,
        })),
        4 => with(|id, command| to_agent::Message::Open(Open {
            id: Some(id),
            command,
            ..Open::default()
        })),
        1 => with(|id, command| to_agent::Message::Announce(Announce { id: Some(id), command })),
        1 => Just(to_agent::Message::Open(Open::default())),
    ]
}

fn heard() -> impl Strategy<Value = Input> {
    (0u8..3, 0usize..4, 1u8..3, any::<bool>()).prop_map(|(tap, heard, mac, own_mac)| {
        Input::Heard(HeardFrame {
            interface: format!("tap{tap}"),
            mac: format!("52:54:00:00:00:0{mac}").parse().unwrap(),
            heard: [
                Heard::Rarp,
                Heard::Garp,
                Heard::NeighbourAdvertisement,
                Heard::Frame,
            ][heard],
            own_mac,
            at: Nanos(1),
            seen: Nanos(2),
        })
    })
}

fn signs() -> impl Strategy<Value = Input> {
    (0usize..3, 0usize..4, any::<bool>()).prop_map(|(domain, sign, qmp)| {
        Input::Lifecycle(LifecycleEvent {
            domain: ["demo_web", "demo_db", "machine"][domain].into(),
            sign: [
                Sign::Paused,
                Sign::Resumed,
                Sign::Left,
                Sign::ResumedAfterFailure,
            ][sign],
            origin: if qmp { Origin::Qmp } else { Origin::Libvirt },
            at: Nanos(1),
            seen: Nanos(2),
        })
    })
}

fn taps() -> impl Strategy<Value = Input> {
    let number = proptest::option::of(prop_oneof![1u32..4, Just(70_000)]);
    vec((0u8..3, number), 0..4).prop_map(|found| {
        let interface = |(port, ofport): (u8, Option<u32>)| {
            let interface = Interface {
                name: format!("tap{port}"),
                ofport,
                ..Interface::default()
            };
            (format!("p{port}"), interface)
        };
        Input::Interfaces(Arc::new(found.into_iter().map(interface).collect()))
    })
}

fn inputs() -> impl Strategy<Value = Input> {
    prop_oneof![
        8 => commands().prop_map(command),
        4 => heard(),
        3 => signs(),
        2 => taps(),
        1 => Just(Input::Linked),
        1 => Just(Input::Unlinked),
        1 => Just(Input::Tick),
        1 => (0u8..3).prop_map(|tap| Input::Deaf { interface: format!("tap{tap}") }),
    ]
}

impl Model {
    /// Takes what came in and what was made of it; panics where that must not be.
    fn check(&mut self, input: &Input, out: &[Output]) {
        if let Input::Interfaces(interfaces) = input {
            self.interfaces = interfaces.clone();
        }
        if let Input::Deaf { interface } = input {
            self.listening.remove(interface);
        }
        if let Input::Command { message, .. } = input {
            self.obey(message, out);
        }
        let expired = out.contains(&Output::Count(Counted::Expired));
        assert!(!expired, "no time has passed");
        for output in out {
            match output {
                Output::Open { frames, .. } => self.may_open(input, frames),
                Output::Announce { .. } => assert!(matches!(
                    input,
                    Input::Command {
                        message: to_agent::Message::Announce(_),
                        ..
                    }
                )),
                Output::Listen { interface, .. } => drop(self.listening.insert(interface.clone())),
                Output::Deafen { interface } => drop(self.listening.remove(interface)),
                Output::KeepSwitch(keep) => self.warm = *keep,
                Output::ExpectToOpen(ports) => {
                    // Without a connection there is nobody to be told.
                    assert!(self.warm || ports.is_empty(), "{out:?}");
                    self.expected.clone_from(ports);
                }
                _ => {}
            }
        }
        assert_eq!(self.expected, self.to_be_opened());
    }

    /// The numbers of the ports of what is armed as the target.
    fn to_be_opened(&self) -> BTreeSet<u16> {
        let targets = self.armed.values().filter(|armed| armed.target);
        let ports = targets.flat_map(|armed| &armed.ports);
        let numbers = ports.filter_map(|port| self.interfaces.get(&port.name)?.ofport);
        numbers
            .filter_map(|number| number.try_into().ok())
            .collect()
    }

    fn obey(&mut self, message: &to_agent::Message, out: &[Output]) {
        let done = |what| {
            let done = Counted::Command(what, outcome::Result::Done);
            out.contains(&Output::Count(done))
        };
        match message {
            to_agent::Message::Arm(arm) if done("arm") => {
                let id = arm.id.clone().unwrap();
                self.advance(&id);
                let believed = Believed {
                    target: arm.side() == agent::Side::Target,
                    ports: arm.ports.clone(),
                    id: id.clone(),
                };
                self.armed.insert(id.vm, believed);
            }
            to_agent::Message::Disarm(disarm) if done("disarm") => {
                let id = disarm.id.clone().unwrap();
                self.advance(&id);
                self.armed.remove(&id.vm);
            }
            _ => {}
        }
    }

    /// Commands of an older handover are never carried out.
    fn advance(&mut self, id: &HandoverId) {
        let newest = self.newest.entry(id.vm.clone()).or_default();
        assert!(id.epoch >= *newest, "{id:?} after {newest}");
        *newest = id.epoch;
        if let Some(armed) = self.armed.get(&id.vm) {
            let same_epoch = armed.id.epoch == id.epoch;
            assert!(!same_epoch || armed.id == *id, "{id:?} for {armed:?}");
        }
    }

    /// Only on the word of a controller, for the target of exactly that handover, and nothing but
    /// the frames that open its ports.
    fn may_open(&self, input: &Input, frames: &PacketOuts) {
        let Input::Command {
            message: to_agent::Message::Open(open),
            ..
        } = input
        else {
            panic!("{input:?} opened something");
        };
        let id = open.id.as_ref().unwrap();
        let armed = &self.armed[&id.vm];
        assert!(armed.target && armed.id == *id, "{id:?} for {armed:?}");
        let stations = armed.ports.iter().map(|port| {
            let ofport = self.interfaces[&port.name].ofport.unwrap();
            (ofport, port.mac.parse().unwrap())
        });
        assert_eq!(*frames, PacketOuts::opening(stations).unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn nothing_opens_but_the_target_of_what_is_armed(sequence in vec(inputs(), 0..60)) {
        let mut bench = Bench {
            core: Core::default(),
            now: Instant::now(),
        };
        let mut model = Model::default();
        for input in [Input::Linked].into_iter().chain(sequence) {
            let out = bench.does(input.clone());
            model.check(&input, &out);
            let armed: BTreeSet<_> = bench.core.armed().map(|(vm, _)| vm.name.clone()).collect();
            let believed: BTreeSet<_> = model.armed.keys().cloned().collect();
            prop_assert_eq!(armed, believed);
        }
        // After a Disarm of each nothing is left.
        for vm in VMS {
            let id = Some(HandoverId {
                vm: vm.into(),
                ..super::id(9)
            });
            let input = command(to_agent::Message::Disarm(Disarm { id, stays: false }));
            let out = bench.does(input.clone());
            model.check(&input, &out);
        }
        prop_assert!(!bench.core.is_busy());
        prop_assert!(model.listening.is_empty(), "{:?}", model.listening);
        prop_assert!(!model.warm && model.expected.is_empty());
        prop_assert!(bench.core.domains.is_empty() && bench.core.ears.is_empty());
        bench.passes(EXPIRY);
        prop_assert!(bench.core.vms.is_empty());
    }

    #[test]
    fn frames_and_events_alone_do_nothing_but_tell(sequence in vec(prop_oneof![heard(), signs()], 0..40)) {
        let mut bench = Bench::new();
        bench.does(arm_target(1));
        for input in sequence {
            for output in bench.does(input) {
                let harmless = matches!(
                    output,
                    Output::Say(_) | Output::Count(_) | Output::AskLastFrame { .. }
                );
                prop_assert!(harmless, "{output:?}");
            }
        }
    }
}
