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
    /// The controller had it opened, or a frame or the controller has shown that the guest is here.
    is_to_be_open: bool,
}

/// What the test believes, from inputs and from what was accepted.
#[derive(Default)]
struct Model {
    armed: BTreeMap<String, Believed>,
    newest: BTreeMap<String, u64>,
    listening: BTreeSet<String>,
    warm: bool,
    expected: BTreeSet<u16>,
    expected_open: BTreeSet<u16>,
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
    let port = (0u8..3, 0u8..3).prop_map(|(number, mac)| Port {
        name: format!("p{number}"),
        mac: match mac {
            0 => String::new(),
            mac => format!("52:54:00:00:00:0{mac}"),
        },
        addresses: vec![format!("10.0.0.{mac}")],
    });
    vec(port, 0..3)
}

fn arming() -> impl Strategy<Value = to_agent::Message> {
    let options = (any::<bool>(), any::<bool>(), any::<Option<bool>>());
    let parts = (handover(), 0..3i32, ports(), options);
    parts.prop_map(|(id, side, ports, (routes, renamed, guest_here))| {
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
            guest_here,
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
    vec((0u8..3, number, any::<bool>()), 0..4).prop_map(|found| {
        let interface = |(port, ofport, is_tap): (u8, Option<u32>, bool)| {
            let interface = Interface {
                name: format!("tap{port}"),
                ofport,
                is_tap,
                ..Interface::default()
            };
            (format!("p{port}"), interface)
        };
        Input::Interfaces(Arc::new(found.into_iter().map(interface).collect()))
    })
}

fn blocked() -> impl Strategy<Value = Input> {
    proptest::collection::btree_set(1u16..4, 1..4).prop_map(|ports| Input::Blocked {
        ports,
        at: Nanos(3),
    })
}

fn inputs() -> impl Strategy<Value = Input> {
    prop_oneof![
        8 => commands().prop_map(command),
        4 => heard(),
        3 => signs(),
        2 => taps(),
        3 => blocked(),
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
        match input {
            Input::Command { message, .. } => self.obey(message, out),
            Input::Heard(frame) => self.show(frame),
            _ => {}
        }
        let expired = out.contains(&Output::Count(Counted::Expired));
        assert!(!expired, "no time has passed");
        for output in out {
            match output {
                Output::Open { frames, .. } => self.may_open(input, frames),
                Output::Announce { command, .. } => assert!(match input {
                    Input::Command { message, .. } => {
                        command.is_some() && matches!(message, to_agent::Message::Announce(_))
                    }
                    Input::Lifecycle(_) => command.is_none(),
                    _ => false,
                }),
                Output::Listen { interface, .. } => drop(self.listening.insert(interface.clone())),
                Output::Deafen { interface } => drop(self.listening.remove(interface)),
                Output::KeepSwitch(keep) => self.warm = *keep,
                Output::ExpectToOpen(ports) => {
                    // Without a connection there is nobody to be told.
                    assert!(self.warm || ports.is_empty(), "{out:?}");
                    self.expected.clone_from(ports);
                }
                Output::ExpectOpen(ports) => self.expected_open.clone_from(ports),
                _ => {}
            }
        }
        assert_eq!(self.expected, self.to_be_opened());
        assert!(self.expected_open.is_subset(&self.expected), "{out:?}");
    }

    /// The numbers of the ports of what is armed as the target.
    fn to_be_opened(&self) -> BTreeSet<u16> {
        let targets = self.armed.values().filter(|armed| armed.target);
        let ports = targets.flat_map(|armed| &armed.ports);
        let ports = ports.filter(|port| !port.mac.is_empty());
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
                let target = arm.side() == agent::Side::Target;
                let known = self.armed.get(&id.vm);
                let known = known.filter(|known| known.id == id && known.target == target);
                let believed = Believed {
                    target,
                    ports: arm.ports.clone(),
                    is_to_be_open: arm.guest_here == Some(true)
                        || known.is_some_and(|known| known.is_to_be_open),
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

    /// A frame that names the guest's MAC and came in by a port of its.
    fn show(&mut self, frame: &HeardFrame) {
        let is_its = |port: &Port| {
            let interface = self.interfaces.get(&port.name);
            let is_here = interface.is_some_and(|interface| interface.name == frame.interface);
            is_here && frame.own_mac && port.mac == frame.mac.to_string()
        };
        for armed in self.armed.values_mut() {
            armed.is_to_be_open |= armed.ports.iter().any(is_its);
        }
    }

    /// Only what is armed as the target; on the word of a controller for exactly that handover, or where there is a reason
    /// for it to be open; and nothing but the frames that open its ports.
    fn may_open(&mut self, input: &Input, frames: &PacketOuts) {
        let interfaces = self.interfaces.clone();
        let stations = |armed: &Believed| -> BTreeMap<u16, Mac> {
            let ports = armed.ports.iter().filter(|port| !port.mac.is_empty());
            let station = |port: &Port| {
                let number = interfaces.get(&port.name)?.ofport?.try_into().ok()?;
                Some((number, port.mac.parse().unwrap()))
            };
            ports.filter_map(station).collect()
        };
        match input {
            Input::Command {
                message: to_agent::Message::Open(open),
                ..
            } => {
                let id = open.id.as_ref().unwrap();
                let armed = self.armed.get_mut(&id.vm).unwrap();
                assert!(armed.target && armed.id == *id, "{id:?} for {armed:?}");
                armed.is_to_be_open = true;
                assert_eq!(*frames, PacketOuts::opening(stations(armed)).unwrap());
            }
            Input::Blocked { ports, .. } => {
                let reason = |armed: &&Believed| armed.target && armed.is_to_be_open;
                let blocked = |armed: &Believed| {
                    let stations = stations(armed).into_iter();
                    let blocked = stations.filter(|(number, _)| ports.contains(number));
                    PacketOuts::opening(blocked).unwrap() == *frames
                };
                assert!(!frames.is_empty());
                assert!(
                    self.armed.values().filter(reason).any(blocked),
                    "{:?}",
                    self.armed
                );
            }
            _ => panic!("{input:?} opened something"),
        }
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
        prop_assert!(!model.warm && model.expected.is_empty() && model.expected_open.is_empty());
        prop_assert!(bench.core.domains.is_empty() && bench.core.ears.is_empty());
        bench.passes(EXPIRY);
        prop_assert!(bench.core.vms.is_empty());
    }

    #[test]
    fn frames_and_events_alone_do_nothing_but_tell_and_have_it_looked_at(
        sequence in vec(prop_oneof![heard(), signs()], 0..40),
    ) {
        let mut bench = Bench::new();
        bench.does(arm_target(1));
        for input in sequence {
            for output in bench.does(input) {
                let harmless = matches!(
                    output,
                    Output::Say(_)
                        | Output::Count(_)
                        | Output::AskLastFrame { .. }
                        | Output::ExpectOpen(_)
                );
                prop_assert!(harmless, "{output:?}");
            }
        }
    }

    #[test]
    fn on_the_source_nothing_opens(
        sequence in vec(prop_oneof![heard(), signs(), taps(), blocked()], 0..40),
    ) {
        let mut bench = Bench::new();
        bench.does(arm_source(1));
        for input in sequence {
            let out = bench.does(input);
            let opens = |output: &Output| {
                matches!(output, Output::Open { .. } | Output::ExpectOpen(_))
            };
            prop_assert!(!out.iter().any(opens), "{out:?}");
        }
    }
}
