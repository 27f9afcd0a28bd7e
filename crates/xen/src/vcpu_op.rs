//! vCPU operations: areas to register, timers, up and down.

use std::sync::atomic::Ordering::SeqCst;

use hospes_engine::Vcpu;
use hospes_memory::{Area, Page};
use hospes_units::{Gfn, Gpa, Gva, PAGE_SIZE, VcpuId};
use hospes_xen_abi::shared::{RunstateInfo, VI_TIME, VcpuInfo, VcpuTimeInfo};
use hospes_xen_abi::{Errno, event, vcpu as abi};

use crate::guest::{Reply, read, write};
use crate::timers::Timer;
use crate::{Outcome, Xen, lock};

impl Xen {
    pub(crate) fn vcpu_op(
        &self,
        vcpu: &mut dyn Vcpu,
        caller: usize,
        cmd: u64,
        target: u64,
        arg: u64,
    ) -> Result<Reply, Errno> {
        let id = self.vcpu_number(target)?;
        match cmd {
            abi::IS_UP => Ok(Reply::Value(u64::from(self.is_up(VcpuId(id as u32))))),
            abi::UP => {
                self.vcpus[id].up.store(true, SeqCst);
                self.host.wake(VcpuId(id as u32));
                Ok(Reply::OK)
            }
            abi::DOWN => {
                self.vcpus[id].up.store(false, SeqCst);
                if id == caller {
                    return Ok(Reply::Then(Outcome::Down));
                }
                if let Some(control) = self.vcpus[id].control.get() {
                    control.kick();
                }
                self.host.wake(VcpuId(id as u32));
                Ok(Reply::OK)
            }
            abi::GET_RUNSTATE_INFO => {
                let info = lock(&self.vcpus[id].run).info();
                write(vcpu, arg, &info)?;
                Ok(Reply::OK)
            }
            abi::REGISTER_RUNSTATE_AREA => {
                let area = self.area_at(vcpu, arg, size_of::<RunstateInfo>())?;
                let flag = self.runstate_flag.load(SeqCst);
                lock(&self.vcpus[id].run).set_area(area, flag);
                Ok(Reply::OK)
            }
            abi::REGISTER_TIME_AREA => {
                let gva: u64 = read(vcpu, arg)?;
                let area = match gva {
                    0 => None,
                    _ => Some(self.area_at(vcpu, arg, size_of::<VcpuTimeInfo>())?),
                };
                self.time.set_user_area(id, area);
                Ok(Reply::OK)
            }
            abi::REGISTER_VCPU_INFO => {
                let a: abi::RegisterVcpuInfo = read(vcpu, arg)?;
                self.register_vcpu_info(id, a)
            }
            abi::SET_PERIODIC_TIMER => {
                let period: u64 = read(vcpu, arg)?;
                if period < abi::PERIODIC_MIN_NS {
                    return Err(Errno::Inval);
                }
                let now = self.time.now_ns();
                self.timers.set_periodic(id, now, period);
                Ok(Reply::OK)
            }
            abi::STOP_PERIODIC_TIMER => {
                self.timers.stop_periodic(id);
                Ok(Reply::OK)
            }
            abi::SET_SINGLESHOT_TIMER => {
                if id != caller {
                    return Err(Errno::Inval);
                }
                self.set_singleshot(vcpu, id, arg)
            }
            abi::STOP_SINGLESHOT_TIMER => {
                if id != caller {
                    return Err(Errno::Inval);
                }
                self.timers.cancel(Timer::Singleshot(id));
                Ok(Reply::OK)
            }
            abi::SEND_NMI => {
                if let Some(control) = self.vcpus[id].control.get() {
                    control.raise_nmi();
                }
                self.host.wake(VcpuId(id as u32));
                Ok(Reply::OK)
            }
            _ => Err(Errno::NoSys),
        }
    }

    /// Whether a vCPU may run, as far as the guest's own up and down calls go.
    pub fn is_up(&self, id: VcpuId) -> bool {
        self.vcpus
            .get(id.0 as usize)
            .is_some_and(|slot| slot.up.load(SeqCst))
    }

    fn set_singleshot(&self, vcpu: &mut dyn Vcpu, id: usize, arg: u64) -> Result<Reply, Errno> {
        let a: abi::SetSingleshot = read(vcpu, arg)?;
        if a.timeout_abs_ns <= self.time.now_ns() {
            if a.flags & abi::SINGLESHOT_FUTURE != 0 {
                return Err(Errno::Time);
            }
            self.timers.cancel(Timer::Singleshot(id));
            self.post_virq(id, event::VIRQ_TIMER);
        } else {
            self.timers.set(Timer::Singleshot(id), a.timeout_abs_ns);
        }
        Ok(Reply::OK)
    }

    fn register_vcpu_info(&self, id: usize, a: abi::RegisterVcpuInfo) -> Result<Reply, Errno> {
        let slot = &self.vcpus[id];
        let offset = a.offset as usize;
        if !offset.is_multiple_of(8) || offset > PAGE_SIZE as usize - size_of::<VcpuInfo>() {
            return Err(Errno::Inval);
        }
        if slot.registered_info.get().is_some() {
            return Err(Errno::Inval);
        }
        if a.gfn > u64::MAX >> 12 {
            return Err(Errno::Inval);
        }
        let page = Page::of_frame(&self.memory, Gfn(a.gfn)).map_err(|_| Errno::Inval)?;
        let old = slot.info().clone();
        let new = Area::in_page(page.clone(), offset);
        for word in (0..VI_TIME).step_by(8) {
            new.u64(word).store(old.u64(word).load(SeqCst), SeqCst);
        }
        self.time.add_area(Area::in_page(page, offset + VI_TIME));
        if slot.registered_info.set(new).is_err() {
            return Err(Errno::Busy);
        }
        self.vm.mark_written(
            Gpa(Gfn(a.gfn).gpa().0 + u64::from(a.offset)),
            size_of::<VcpuInfo>() as u64,
        );
        // An event may have been marked in the old place while the new one was filled: have the guest look at everything.
        self.mark_selected(id, u64::MAX);
        Ok(Reply::OK)
    }

    /// The area whose virtual address lies at `arg`, translated now with the caller's page tables.
    fn area_at(&self, vcpu: &mut dyn Vcpu, arg: u64, bytes: usize) -> Result<Area, Errno> {
        let gva: u64 = read(vcpu, arg)?;
        if !gva.is_multiple_of(8) {
            return Err(Errno::Inval);
        }
        let mut page_at = |at: u64| {
            let gpa = vcpu.translate(Gva(at)).ok_or(Errno::Fault)?;
            self.vm.mark_written(Gpa(gpa.gfn().gpa().0), PAGE_SIZE);
            Page::of_frame(&self.memory, gpa.gfn()).map_err(|_| Errno::Fault)
        };
        let offset = Gva(gva).page_offset() as usize;
        let first = page_at(gva)?;
        if offset + bytes <= PAGE_SIZE as usize {
            return Ok(Area::in_page(first, offset));
        }
        let next = Gva(gva).page().0.checked_add(PAGE_SIZE);
        let second = page_at(next.ok_or(Errno::Fault)?)?;
        Ok(Area::across(first, offset, second))
    }
}
