//! Made-up measurements, for tests.

use dataplane_probe::report as probe;

/// A run of which the probe has nothing to say.
pub(crate) fn measured() -> probe::Report {
    let direction = probe::Direction {
        period_us: 1_000,
        ..probe::Direction::default()
    };
    probe::Report {
        schema: String::new(),
        version: String::new(),
        target: ([192, 0, 2, 1], 7_000).into(),
        family: probe::Family::Ipv4,
        session: String::new(),
        rate_hz: 1_000,
        packet_bytes: 128,
        started_ns: 0,
        ended_ns: 5_000_000_000,
        valid: true,
        reasons: Vec::new(),
        to_vm: direction.clone(),
        from_vm: direction,
        round_trip: None,
        tcp: None,
        new_connections: None,
        foreign: 0,
        callers: Vec::new(),
    }
}
