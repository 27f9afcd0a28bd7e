//! What the guest may ask of Xen's version, and the small calls without a home: the emergency console and assists.

use std::sync::atomic::Ordering::Relaxed;

use hospes_engine::Vcpu;
use hospes_units::{Gva, PAGE_SIZE};
use hospes_xen_abi::{Errno, hypercall, version};

use crate::Xen;
use crate::guest::{Reply, read, write};

/// The version told to guests: 4.17.
pub const XEN_MAJOR: u32 = 4;
pub const XEN_MINOR: u32 = 17;

const FEATURES: u32 = version::FEATURE_WRITABLE_PAGE_TABLES
    | version::FEATURE_AUTO_TRANSLATED_PHYSMAP
    | version::FEATURE_HVM_CALLBACK_VECTOR
    | version::FEATURE_HVM_SAFE_PVCLOCK
    | version::FEATURE_NOT_DIRECT_MAPPED;

/// Most bytes one call may write to the emergency console.
const CONSOLE_IO_MAX: u64 = 4096;

/// A string at the start of a zeroed field.
fn field<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let len = text.len().min(N - 1);
    bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
    bytes
}

impl Xen {
    pub(crate) fn xen_version(
        &self,
        vcpu: &mut dyn Vcpu,
        cmd: u64,
        arg: u64,
    ) -> Result<Reply, Errno> {
        match cmd {
            version::VERSION => return Ok(Reply::Value(u64::from(XEN_MAJOR << 16 | XEN_MINOR))),
            version::PAGESIZE => return Ok(Reply::Value(PAGE_SIZE)),
            version::EXTRAVERSION => write(
                vcpu,
                arg,
                &field::<{ version::EXTRAVERSION_BYTES }>(".0-hospes"),
            )?,
            version::COMPILE_INFO => write(
                vcpu,
                arg,
                &version::CompileInfo {
                    compiler: field("rustc"),
                    by: field("hospes"),
                    domain: field(""),
                    date: field(""),
                },
            )?,
            version::CAPABILITIES => write(
                vcpu,
                arg,
                &field::<{ version::CAPABILITIES_BYTES }>(
                    "hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64",
                ),
            )?,
            version::CHANGESET => write(
                vcpu,
                arg,
                &field::<{ version::CHANGESET_BYTES }>(concat!(
                    "hospes ",
                    env!("CARGO_PKG_VERSION")
                )),
            )?,
            version::PLATFORM_PARAMETERS => write(vcpu, arg, &0u64)?,
            version::GET_FEATURES => {
                let mut info: version::FeatureInfo = read(vcpu, arg)?;
                if info.submap_idx != 0 {
                    return Err(Errno::Inval);
                }
                info.submap = FEATURES;
                write(vcpu, arg, &info)?;
            }
            version::GUEST_HANDLE => write(vcpu, arg, &self.config.uuid)?,
            version::COMMANDLINE => write(vcpu, arg, &[0u8; version::COMMANDLINE_BYTES])?,
            version::BUILD_ID => return Err(Errno::NoData),
            _ => return Err(Errno::NoSys),
        }
        Ok(Reply::OK)
    }

    pub(crate) fn console_io(
        &self,
        vcpu: &mut dyn Vcpu,
        cmd: u64,
        count: u64,
        buffer: u64,
    ) -> Result<Reply, Errno> {
        match cmd {
            hypercall::CONSOLEIO_WRITE => {
                let mut bytes = vec![0; count.min(CONSOLE_IO_MAX) as usize];
                vcpu.read_virt(Gva(buffer), &mut bytes)
                    .map_err(|_| Errno::Fault)?;
                self.host.console_write(&bytes);
                Ok(Reply::OK)
            }
            hypercall::CONSOLEIO_READ => Ok(Reply::OK),
            _ => Err(Errno::NoSys),
        }
    }

    pub(crate) fn vm_assist(&self, cmd: u64, kind: u64) -> Result<Reply, Errno> {
        if kind != hypercall::VMASST_RUNSTATE_UPDATE_FLAG {
            return Err(Errno::NoSys);
        }
        match cmd {
            hypercall::VMASST_ENABLE => self.runstate_flag.store(true, Relaxed),
            hypercall::VMASST_DISABLE => self.runstate_flag.store(false, Relaxed),
            _ => return Err(Errno::NoSys),
        }
        Ok(Reply::OK)
    }
}
