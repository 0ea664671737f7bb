//! What a bench leaves in its output directory.

use std::fmt::Write as _;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::check::named;
use super::{Figures, Measured, Results, Run, plot};
use crate::scenario::Topology;

const RESULTS: &str = "results.json";
const RUNS: &str = "runs.csv";
/// Pictures are called so, the topology, and in those of one strategy its name.
const PICTURE: &str = "switch-";

/// Removes what an earlier bench left, so that it is not taken for that of one that breaks off early.
pub fn remove_old(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| dir.display().to_string())?,
    };
    for entry in entries {
        let path = entry.with_context(|| dir.display().to_string())?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let is_svg = path.extension().is_some_and(|extension| extension == "svg");
        let is_ours = |name: &str| {
            let is_picture = is_svg && name.starts_with(PICTURE);
            name == RESULTS || name == RUNS || is_picture
        };
        if name.is_some_and(is_ours) {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// Writes `results.json` with these results, `runs.csv` with every single migration, and for each topology
/// `switch-<topology>.svg` with one migration of every strategy and `switch-<topology>-<strategy>.svg` with each alone.
/// Returns where the pictures of topologies are.
pub fn write(dir: &Path, results: &Results, measured: &Measured) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let mut json = serde_json::to_vec_pretty(results)?;
    json.push(b'\n');
    put(&dir.join(RESULTS), &json)?;
    put(&dir.join(RUNS), csv(&measured.runs).as_bytes())?;
    let mut written = Vec::new();
    for topology in [Topology::Shared, Topology::Routed] {
        let pictures = measured.pictures(topology);
        if pictures.is_empty() {
            continue;
        }
        let path = dir.join(format!("{PICTURE}{}.svg", named(topology)));
        put(&path, plot(&pictures)?.as_bytes())?;
        written.push(path);
        for picture in pictures {
            let name = format!("{PICTURE}{}-{}.svg", named(topology), picture.strategy);
            put(&dir.join(name), plot(&[picture])?.as_bytes())?;
        }
    }
    Ok(written)
}

/// Writes a file as a whole: whoever reads it meanwhile sees the old one or the new one.
fn put(path: &Path, content: &[u8]) -> Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let shown = || path.display().to_string();
    fs::write(&new, content).with_context(shown)?;
    fs::rename(&new, path).with_context(shown)
}

const COLUMNS: &str = "topology,strategy,run,source,target,pause_ms,guest_wake_ms,network_added_ms,to_vm_lost,\
                       from_vm_lost,to_vm_duplicated,from_vm_duplicated,tcp_stall_ms,activated_ms,flipped_ms,invalid,\
                       to_vm_gap_ms,from_vm_gap_ms,event_us,stream_us,packet_out_us,switch_us,ovn_us,tcp_added_ms,lost_at_ms,\
                       failure";
/// Losses of one migration that are told one by one; of more, what is to be known of them is how many there were.
const TOLD: usize = 20;

fn csv(runs: &[Run]) -> String {
    let mut text = format!("{COLUMNS}\n");
    for run in runs {
        let Run {
            strategy,
            topology,
            number,
            measured,
        } = run;
        let rest = match measured {
            Ok(figures) => fields(figures),
            // All that follow are not known.
            Err(error) => {
                let unknown = COLUMNS.split(',').count() - 4;
                format!("{},{}", ",".repeat(unknown - 1), quoted(error))
            }
        };
        // Writing to a string cannot fail.
        _ = writeln!(text, "{},{strategy},{number},{rest}", named(*topology));
    }
    text
}

fn fields(figures: &Figures) -> String {
    let Figures {
        source,
        target,
        to_vm_lost,
        from_vm_lost,
        to_vm_duplicated,
        from_vm_duplicated,
        invalid,
        to_vm_gap_ms,
        from_vm_gap_ms,
        ..
    } = figures;
    let millis = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.3}"));
    let [pause, wake, added, stall, tcp_added, activated, flipped] = [
        figures.pause_ms,
        figures.guest_wake_ms,
        figures.network_added_ms,
        figures.tcp_stall_ms,
        figures.tcp_added_ms,
        figures.activated_ms,
        figures.flipped_ms,
    ]
    .map(millis);
    format!(
        "{source},{target},{pause},{wake},{added},{to_vm_lost},{from_vm_lost},{to_vm_duplicated},{from_vm_duplicated},\
         {stall},{activated},{flipped},{},{},{},{},{tcp_added},{},",
        !invalid.is_empty(),
        millis(*to_vm_gap_ms),
        millis(*from_vm_gap_ms),
        hops(figures),
        lost_at(figures),
    )
}

/// How the port was opened on the pause, hop by hop.
fn hops(figures: &Figures) -> String {
    let opening = figures.opening.clone().unwrap_or_default();
    let hops = [
        opening.event,
        opening.stream,
        opening.packet_out,
        opening.switch,
        opening.ovn,
    ];
    hops.map(|micros| micros.map_or_else(String::new, |micros| micros.to_string()))
        .join(",")
}

/// When the packets were sent that did not reach the VM, from the pause on.
fn lost_at(figures: &Figures) -> String {
    let lost = figures
        .picture
        .iter()
        .flat_map(|picture| &picture.to_vm.lost);
    let lost: Vec<_> = lost.take(TOLD).map(|at| format!("{at:.1}")).collect();
    lost.join(" ")
}

/// A field that may hold anything (RFC 4180).
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\"").replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::super::samples::{figures, picture, run};
    use super::*;
    use crate::scenario::Strategy;

    fn measured() -> Measured {
        let mut good = figures(80.0, 0.5, 1);
        good.picture = Some(picture(Strategy::Segue, 1, 0));
        Measured {
            runs: vec![
                run(Strategy::Segue, good),
                Run {
                    measured: Err("it says \"no\",\nand why".to_owned()),
                    ..run(Strategy::Single, figures(1.0, 1.0, 1))
                },
            ],
            ..Measured::default()
        }
    }

    #[test]
    fn every_line_of_the_csv_has_every_field() {
        let text = csv(&measured().runs);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        let columns = lines[0].split(',').count();
        assert_eq!(lines[1].split(',').count(), columns);
        assert!(lines[1].starts_with("shared,segue,1,node1,node2,80.000,20.000,0.500,1,0,0,0,"));
        let (known, failure) = lines[2].split_once(",\"").unwrap();
        assert_eq!(known.split(',').count(), columns - 1);
        assert_eq!(failure, "it says \"\"no\"\", and why\"");
    }

    #[test]
    fn what_was_there_before_goes_and_what_is_not_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        for name in ["results.json", "switch-shared-single.svg", "notes.txt"] {
            fs::write(path.join(name), "of an earlier run").unwrap();
        }
        remove_old(path).unwrap();
        let measured = measured();
        write(path, &measured.results(), &measured).unwrap();
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                "notes.txt",
                "results.json",
                "runs.csv",
                "switch-shared-segue.svg",
                "switch-shared.svg"
            ]
        );
        remove_old(&path.join("nowhere")).unwrap();
    }
}
