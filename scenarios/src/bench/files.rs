//! What a run leaves in its output directory.

use std::fmt::Write as _;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Measured, plot};

const RESULTS: &str = "results.json";
const SAMPLES: &str = "flips.csv";
const PLOT: &str = "flip.svg";

/// Removes what an earlier run left, so that it is not taken for that of one that breaks off early.
pub fn remove_old(dir: &Path) -> Result<()> {
    for name in [RESULTS, SAMPLES, PLOT] {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| path.display().to_string());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Writes `results.json`, `flip.svg`, and `flips.csv` with every single flip.
pub fn write(dir: &Path, measured: &Measured) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let mut json = serde_json::to_vec_pretty(&measured.results)?;
    json.push(b'\n');
    for (name, content) in [
        (RESULTS, json),
        (SAMPLES, csv(measured).into_bytes()),
        (PLOT, plot(&measured.results)?.into_bytes()),
    ] {
        let path = dir.join(name);
        fs::write(&path, content).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn csv(measured: &Measured) -> String {
    let mut text = "vms,method,commit_ms,sb_ms,flows_ms\n".to_owned();
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    for sample in &measured.samples {
        let method = sample.method.map_or("nothing", super::Method::as_str);
        let times = &sample.times;
        // Writing to a string cannot fail.
        _ = writeln!(
            text,
            "{},{method},{:.3},{:.3},{:.3}",
            sample.vms,
            millis(times.commit),
            millis(times.sb),
            millis(times.flows)
        );
    }
    text
}
