//! Core files of domains.

use std::path::Path;

use hospes_toolstack::Host;

use crate::Outcome;
use crate::output::Line;
use crate::table::Call;

pub(crate) fn dump_core(call: &Call) -> Outcome {
    let host = Host::from_environment()?;
    let mut line = Line::new("Dumped");
    let path = Path::new(call.args.at(1));
    host.dump_core(call.args.at(0), path, &mut |bytes| line.show_bytes(bytes))?;
    line.end();
    Ok(())
}
